//! A load generator: each of `--concurrency` connections streams one chat completion after another until `--requests` are
//! done; with `--rate`, each at its own time, from which its times are counted then. Every stream is checked: status, each token in its order, a finish reason, `[DONE]`.
//!
//! Prints one JSON object. Times are as the client sees them: a token's time is that of the read that brought it, so
//! tokens that came together have a gap of zero.
#![allow(clippy::print_stdout)]

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    fs, io,
    process::ExitCode,
    rc::Rc,
    time::{Duration, Instant},
};

use clap::Parser;
use load::http::{Connection, malformed};
use memchr::memmem::Finder;
use tokio::{io::AsyncWriteExt, net::TcpStream, task, task::JoinSet, time};

/// Streams chat completions and says what that was like.
#[derive(Parser)]
struct Arguments {
    /// Where to: http://HOST:PORT; given several times, connections take turns
    #[arg(long = "url", required = true)]
    urls: Vec<String>,
    /// Streams altogether
    #[arg(long, default_value_t = 1000)]
    requests: u64,
    /// Connections, each with one stream at a time
    #[arg(long, default_value_t = 64)]
    concurrency: usize,
    /// Tokens of a stream
    #[arg(long, default_value_t = 32)]
    tokens: u32,
    /// Whole answers in place of streams: their first token comes with their last
    #[arg(long)]
    whole: bool,
    /// Model to ask for
    #[arg(long, default_value = "bench")]
    model: String,
    /// Another seed, other prompts: what a cache has seen in one run it has not seen in the next
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Streams begun in a second, evenly; without it each begins when a connection is free
    #[arg(long)]
    rate: Option<f64>,
    /// Bytes of a prompt
    #[arg(long, default_value_t = 200)]
    prompt_bytes: usize,
    /// How many of them are one of `--documents`, which come again and again; the rest is new in every prompt
    #[arg(long, default_value_t = 0)]
    shared_bytes: usize,
    /// Different beginnings
    #[arg(long, default_value_t = 1)]
    documents: u64,
    /// How long a stream may take before it counts as failed
    #[arg(long, default_value_t = 10)]
    timeout_s: u64,
    /// Failures after which no more is sent; what was not sent counts as failed
    #[arg(long, default_value_t = 32)]
    give_up_after: u64,
}

/// What was measured, in µs.
#[derive(Default)]
struct Samples {
    first_token: Vec<u32>,
    gaps: Vec<u32>,
    total: Vec<u32>,
    failures: u64,
    reasons: BTreeMap<String, u64>,
}

struct Run {
    arguments: Arguments,
    next: Cell<u64>,
    samples: RefCell<Samples>,
    documents: Vec<String>,
    begun: Instant,
    text: Finder<'static>,
    finish: Finder<'static>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let connections = arguments.concurrency;
    let run = Rc::new(Run {
        next: Cell::new(0),
        samples: RefCell::default(),
        text: Finder::new(r#""content":""#),
        finish: Finder::new(r#""finish_reason":""#),
        documents: (0..arguments.documents).map(|number| words(!number, arguments.shared_bytes)).collect(),
        begun: Instant::now(),
        arguments,
    });
    let local = task::LocalSet::new();
    let all = async {
        let mut tasks = JoinSet::new();
        for number in 0..connections {
            tasks.spawn_local(connection(Rc::clone(&run), number));
        }
        while let Some(ended) = tasks.join_next().await {
            ended.expect("a connection's task does not panic");
        }
    };
    local.run_until(all).await;
    print(&run, run.begun.elapsed());
    ExitCode::SUCCESS
}

/// Streams until there is nothing left to be done. A connection that failed is opened anew.
async fn connection(run: Rc<Run>, number: usize) {
    let address = run.arguments.urls[number % run.arguments.urls.len()].clone();
    let address = address.trim_start_matches("http://").trim_end_matches('/');
    let mut open = None;
    loop {
        let serial = run.next.get();
        if serial == run.arguments.requests {
            return;
        }
        if run.samples.borrow().failures >= run.arguments.give_up_after {
            run.give_up(serial);
            return;
        }
        run.next.set(serial + 1);
        let limit = Duration::from_secs(run.arguments.timeout_s);
        let error = match time::timeout(limit, stream(&run, &mut open, address, serial)).await {
            Ok(Ok(())) => continue,
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no end within {} s", run.arguments.timeout_s),
        };
        open = None;
        run.failed(error, 1);
    }
}

impl Run {
    fn failed(&self, reason: String, streams: u64) {
        let mut samples = self.samples.borrow_mut();
        samples.failures += streams;
        *samples.reasons.entry(reason).or_default() += streams;
    }

    /// Counts all from `serial` on as failed, so that a dead proxy is told of within seconds.
    fn give_up(&self, serial: u64) {
        self.next.set(self.arguments.requests);
        self.failed("not sent, since too many failed".to_owned(), self.arguments.requests - serial);
    }
}

async fn stream(run: &Run, open: &mut Option<Connection>, address: &str, serial: u64) -> io::Result<()> {
    let mut connection = match open.take() {
        Some(connection) => connection,
        None => Connection::new(TcpStream::connect(address).await?)?,
    };
    let request = request(run, address, serial);
    let begun = match run.arguments.rate {
        None => Instant::now(),
        Some(rate) => {
            let due = run.begun + Duration::from_secs_f64(serial as f64 / rate);
            time::sleep_until(due.into()).await;
            due
        }
    };
    connection.stream.write_all(request.as_bytes()).await?;
    let mut response = connection.response().await?;
    let mut text = Vec::with_capacity(8 * 1024);
    if response.status != 200 {
        while connection.read_body(&mut response.body, &mut text).await? {}
        let text = String::from_utf8_lossy(&text);
        return Err(malformed(format!("status {}: {}", response.status, text.chars().take(200).collect::<String>())));
    }
    if run.arguments.whole {
        while connection.read_body(&mut response.body, &mut text).await? {}
        check_whole(run, &text)?;
        let mut samples = run.samples.borrow_mut();
        samples.first_token.push(micros(begun.elapsed()));
        samples.total.push(micros(begun.elapsed()));
        if !response.close {
            *open = Some(connection);
        }
        return Ok(());
    }
    let mut progress = Progress::default();
    let mut gaps = Vec::with_capacity(run.arguments.tokens as usize);
    let (mut first, mut last) = (None, begun);
    while connection.read_body(&mut response.body, &mut text).await? {
        let now = Instant::now();
        for _ in 0..progress.events(run, &mut text)? {
            match first {
                None => first = Some(now),
                Some(_) => gaps.push(micros(now - last)),
            }
            last = now;
        }
    }
    progress.check(run.arguments.tokens)?;
    let mut samples = run.samples.borrow_mut();
    samples.first_token.push(micros(first.unwrap_or(last) - begun));
    samples.gaps.append(&mut gaps);
    samples.total.push(micros(begun.elapsed()));
    if !response.close {
        *open = Some(connection);
    }
    Ok(())
}

/// How far a stream has come.
#[derive(Default)]
struct Progress {
    tokens: u32,
    finished: bool,
    done: bool,
}

impl Progress {
    /// Takes the whole lines out of `text` and says how many tokens they brought.
    fn events(&mut self, run: &Run, text: &mut Vec<u8>) -> io::Result<u32> {
        let (before, mut begin) = (self.tokens, 0);
        while let Some(length) = memchr::memchr(b'\n', &text[begin..]) {
            let line = &text[begin..begin + length];
            begin += length + 1;
            if let Some(data) = line.strip_prefix(b"data: ") {
                self.event(run, data)?;
            }
        }
        text.drain(..begin);
        Ok(self.tokens - before)
    }

    fn event(&mut self, run: &Run, data: &[u8]) -> io::Result<()> {
        if data.trim_ascii_end() == b"[DONE]" {
            self.done = true;
            return Ok(());
        }
        if let Some(at) = run.text.find(data) {
            let text = &data[at + run.text.needle().len()..];
            // Token n is the text " n"; the role's event has an empty one.
            if let Some(number) = text.strip_prefix(b" ") {
                let digits = number.iter().take_while(|byte| byte.is_ascii_digit());
                let number = digits.fold(0, |number, digit| number * 10 + u32::from(digit - b'0'));
                if number != self.tokens {
                    return Err(malformed(format!("token {number} came instead of {}", self.tokens)));
                }
                self.tokens += 1;
            }
        }
        self.finished |= run.finish.find(data).is_some();
        Ok(())
    }

    fn check(&self, tokens: u32) -> io::Result<()> {
        if self.tokens != tokens {
            return Err(malformed(format!("{} of {tokens} tokens came", self.tokens)));
        }
        if !self.finished || !self.done {
            return Err(malformed("the stream ended without a finish reason or [DONE]"));
        }
        Ok(())
    }
}

/// Checks an answer that came whole: all tokens in their order, and why it ended.
fn check_whole(run: &Run, text: &[u8]) -> io::Result<()> {
    let expected: String = (0..run.arguments.tokens).map(|token| format!(" {token}")).collect();
    let content = run.text.find(text).map(|at| &text[at + run.text.needle().len()..]);
    let rest = content.and_then(|content| content.strip_prefix(expected.as_bytes()));
    if !rest.is_some_and(|rest| rest.starts_with(b"\"")) {
        return Err(malformed("the answer has not its tokens in their order"));
    }
    if run.finish.find(text).is_none() {
        return Err(malformed("the answer has no finish reason"));
    }
    Ok(())
}

fn request(run: &Run, address: &str, serial: u64) -> String {
    let Arguments { model, tokens, seed, prompt_bytes, shared_bytes, documents, whole, .. } = &run.arguments;
    let shared = &run.documents[(serial % documents) as usize];
    let body = format!(
        r#"{{"model":"{model}","messages":[{{"role":"user","content":"{shared}{}"}}],"max_tokens":{tokens},"stream":{}}}"#,
        words(seed.wrapping_shl(32) ^ serial, prompt_bytes.saturating_sub(*shared_bytes)),
        !whole
    );
    format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// About so many bytes of words, different from the first word on.
fn words(seed: u64, bytes: usize) -> String {
    const WORDS: [&str; 16] = [
        "river", "engine", "seven", "cloud", "letter", "paper", "green", "window", "answer", "summer", "market", "silver",
        "number", "garden", "morning", "winter",
    ];
    let mut text = if bytes == 0 { String::new() } else { format!("{seed:x}") };
    let mut state = seed;
    while text.len() < bytes {
        // SplitMix64 (Steele, Lea and Flood, 2014).
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        text.push(' ');
        text.push_str(WORDS[(mixed >> 60) as usize]);
    }
    text
}

fn micros(duration: Duration) -> u32 {
    u32::try_from(duration.as_micros()).unwrap_or(u32::MAX)
}

fn print(run: &Run, wall: Duration) {
    let samples = &mut *run.samples.borrow_mut();
    let done = samples.total.len();
    let result = serde_json::json!({
        "requests": run.arguments.requests,
        "concurrency": run.arguments.concurrency,
        "failures": samples.failures,
        "reasons": samples.reasons,
        "wall_s": wall.as_secs_f64(),
        "streams_per_s": done as f64 / wall.as_secs_f64(),
        "ttft_us": quantiles(&mut samples.first_token),
        "gap_us": quantiles(&mut samples.gaps),
        "total_us": quantiles(&mut samples.total),
        "cpu_s": own_cpu_s(),
    });
    println!("{result}");
}

fn quantiles(samples: &mut [u32]) -> serde_json::Value {
    samples.sort_unstable();
    let at = |quantile: f64| samples.get(((samples.len().max(1) - 1) as f64 * quantile).round() as usize).copied();
    let sum: f64 = samples.iter().copied().map(f64::from).sum();
    serde_json::json!({"p50": at(0.5), "p95": at(0.95), "p99": at(0.99), "mean": sum / samples.len().max(1) as f64, "max": samples.last()})
}

/// User and system time of this process, from `/proc/self/stat`; its unit is 1/100 s on all of Linux's platforms of today.
fn own_cpu_s() -> Option<f64> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    let fields: Vec<&str> = stat.rsplit(')').next()?.split_whitespace().collect();
    Some((fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?) / 100.0)
}
