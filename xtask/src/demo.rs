//! `cargo xtask demo`: a new user's first command. Builds everything, starts a host over three mock engines, streams a
//! chat completion through it, and says what happened.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::{paths, policies, run};

/// How long anything may take that the demo waits for.
const PATIENCE: Duration = Duration::from_secs(30);
/// Model that the mock engines serve.
const MODEL: &str = "demo";

pub(crate) fn run(once: bool) -> Result<()> {
    policies::build()?;
    println!("Building the host (the first time takes minutes)");
    // The whole workspace, as the tests build it: by itself the host would have other features, and be built twice.
    run::check(run::cargo().args(["build", "--quiet", "--workspace"]))?;

    let policy = paths::policies().join("least-loaded.wasm");
    let mut command = Command::new(paths::target().join("debug/dynamo-host"));
    command.args(["serve", "--http", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--expose-worker", "--log-level", "warn"]);
    for name in ["a", "b", "c"] {
        command.arg("--worker").arg(format!("mock://{name}?model={MODEL}"));
    }
    command.arg("--routing").arg(&policy);
    let host = Host::start(command)?;
    println!("front door {}, admin {}\n", host.front_door, host.admin);

    let answer = stream_chat(&host)?;
    println!("\n\n  tokens    {}", answer.tokens);
    println!("  worker    {}", answer.worker);
    println!("  policy    {} ({})", answer.policy, policy.display());
    println!("  first     {:.1} ms after the request", answer.first_token.as_secs_f64() * 1e3);
    for (stage, what) in
        [("decode", "reading the request"), ("route", "the policy's decision"), ("dispatch", "all until the engine is asked")]
    {
        println!("  overhead  {:>8.1} µs  {what}", host.mean_stage_us(stage)?);
    }
    ensure!(answer.tokens > 0, "no token came");
    ensure!(answer.policy.starts_with("least-loaded@"), "the policy did not decide: {}", answer.policy);
    if once {
        return Ok(());
    }
    println!("\nThe host runs until Ctrl-C. Try, in another terminal:\n");
    println!(
        "  curl {}/v1/chat/completions -d '{{\"model\":\"{MODEL}\",\"messages\":[{{\"role\":\"user\",\"content\":\"hi\"}}],\"stream\":true}}'",
        host.front_door
    );
    println!("  target/debug/dynamo-host policy activate routing target/policies/round-robin.wasm --admin {}", host.admin);
    println!("  target/debug/dynamo-host status --admin {}", host.admin);
    host.wait()
}

/// A host process. Dropping it ends it.
struct Host {
    process: Child,
    front_door: String,
    admin: String,
}

impl Host {
    fn start(mut command: Command) -> Result<Self> {
        let mut process =
            command.stdout(Stdio::piped()).spawn().with_context(|| format!("cannot run {:?}", command.get_program()))?;
        let output = process.stdout.take().context("the host has no output")?;
        let mut host = Self { process, front_door: String::new(), admin: String::new() };
        // The host prints both listeners or exits: reading ends in either case.
        for line in BufReader::new(output).lines() {
            let line = line?;
            let url = line.rsplit(' ').next().unwrap_or_default().to_owned();
            match line.split_whitespace().next() {
                Some("front") => host.front_door = url,
                Some("admin") => host.admin = url,
                _ => {}
            }
            if !host.admin.is_empty() && !host.front_door.is_empty() {
                return Ok(host);
            }
        }
        bail!("the host did not start; its own message is above")
    }

    /// Mean of a stage of the host's overhead, from its metrics.
    fn mean_stage_us(&self, stage: &str) -> Result<f64> {
        let mut text = String::new();
        request(&self.front_door, "GET /metrics", "")?.read_to_string(&mut text)?;
        let value = |part: &str| {
            let name = format!("dynamo_host_stage_seconds_{part}{{stage=\"{stage}\"}} ");
            text.lines().find_map(|line| line.strip_prefix(&name)?.trim().parse::<f64>().ok())
        };
        let (Some(sum), Some(count)) = (value("sum"), value("count")) else { bail!("the host has no metric of stage {stage}") };
        Ok(sum / count * 1e6)
    }

    fn wait(mut self) -> Result<()> {
        let status = self.process.wait()?;
        ensure!(status.success(), "the host ended with {status}");
        Ok(())
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

struct Answer {
    tokens: usize,
    worker: String,
    policy: String,
    first_token: Duration,
}

/// Streams a completion and prints its tokens as they come.
fn stream_chat(host: &Host) -> Result<Answer> {
    let body = format!(
        r#"{{"model":"{MODEL}","messages":[{{"role":"user","content":"Count for me, please."}}],"max_tokens":24,"stream":true}}"#
    );
    let begun = Instant::now();
    let mut response = request(&host.front_door, "POST /v1/chat/completions", &body)?;
    let mut answer = Answer { tokens: 0, worker: String::new(), policy: String::new(), first_token: Duration::ZERO };
    let mut line = String::new();
    let mut complete = false;
    while response.read_line(&mut line)? > 0 {
        if let Some(worker) = line.strip_prefix("x-dynamo-worker: ") {
            worker.trim().clone_into(&mut answer.worker);
        } else if let Some(policy) = line.strip_prefix("x-dynamo-policy: ") {
            policy.trim().clone_into(&mut answer.policy);
        } else if let Some(data) = line.strip_prefix("data: ") {
            if data.trim() == "[DONE]" {
                complete = true;
            } else {
                let event: Value = serde_json::from_str(data).with_context(|| format!("not an event: {data}"))?;
                if let Some(text) = event["choices"][0]["delta"]["content"].as_str().filter(|text| !text.is_empty()) {
                    if answer.tokens == 0 {
                        answer.first_token = begun.elapsed();
                    }
                    answer.tokens += 1;
                    print!("{text}");
                    std::io::stdout().flush()?;
                }
            }
        }
        line.clear();
    }
    ensure!(complete, "the stream ended without [DONE]");
    Ok(answer)
}

/// Sends a request in HTTP/1.0, so that the answer comes without chunk sizes between its lines.
fn request(base: &str, target: &str, body: &str) -> Result<BufReader<TcpStream>> {
    let address = base.strip_prefix("http://").context("the host printed no URL")?;
    let mut stream = TcpStream::connect(address).with_context(|| format!("cannot connect to {base}"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(
        stream,
        "{target} HTTP/1.0\r\nhost: {address}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )?;
    Ok(BufReader::new(stream))
}
