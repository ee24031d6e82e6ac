//! Load: clients that ask for numbered tokens, one request after another, and count what comes.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use dynamo_engine_mock::tokens;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::harness::client::Client;

/// How long one request may take, however many engines fail it.
const PATIENCE: Duration = Duration::from_secs(45);

/// What is asked, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Ask {
    ChatStream,
    ChatWhole,
    /// Two choices.
    ChatStreamOfTwo,
    ChatWholeOfTwo,
    CompletionStream,
    CompletionWhole,
}

impl Ask {
    pub(crate) const ALL: [Self; 6] = [
        Self::ChatStream,
        Self::ChatWhole,
        Self::ChatStreamOfTwo,
        Self::ChatWholeOfTwo,
        Self::CompletionStream,
        Self::CompletionWhole,
    ];

    fn is_chat(self) -> bool {
        !matches!(self, Self::CompletionStream | Self::CompletionWhole)
    }

    fn is_stream(self) -> bool {
        matches!(self, Self::ChatStream | Self::ChatStreamOfTwo | Self::CompletionStream)
    }

    fn choices(self) -> usize {
        if matches!(self, Self::ChatStreamOfTwo | Self::ChatWholeOfTwo) { 2 } else { 1 }
    }

    fn path(self) -> &'static str {
        if self.is_chat() { "/v1/chat/completions" } else { "/v1/completions" }
    }

    /// Its body. Prompts of all numbers have as many tokens.
    fn body(self, number: u64, tokens: u32) -> Value {
        let says = format!("Count, number {number:08}, please.");
        let mut body = json!({ "model": "m", "max_tokens": tokens });
        if self.is_chat() {
            body["messages"] = json!([{ "role": "user", "content": says }]);
        } else {
            body["prompt"] = says.into();
        }
        if self.choices() > 1 {
            body["n"] = self.choices().into();
        }
        if self.is_stream() {
            body["stream"] = true.into();
            body["stream_options"] = json!({ "include_usage": true });
        }
        body
    }
}

/// What every request is: so many tokens, and as many of a prompt as an engine says when nothing is wrong.
#[derive(Clone, Debug)]
pub(crate) struct Expected {
    pub(crate) tokens: u32,
    prompt_tokens: BTreeMap<Ask, u64>,
}

impl Expected {
    /// Asks an engine.
    pub(crate) async fn of(engine: &Client, tokens: u32) -> Self {
        let mut prompt_tokens = BTreeMap::new();
        for ask in Ask::ALL {
            let mut body = ask.body(0, 1);
            body["stream"] = false.into();
            body.as_object_mut().unwrap().remove("stream_options");
            let reply = engine.ask(ask.path(), &body).await.json();
            prompt_tokens.insert(ask, reply["usage"]["prompt_tokens"].as_u64().unwrap());
        }
        Self { tokens, prompt_tokens }
    }
}

/// One request's way, good or bad.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) ask: Ask,
    /// What was wrong with it.
    pub(crate) fault: Option<String>,
    /// The worker that its head names.
    pub(crate) worker: String,
    pub(crate) began: Instant,
    pub(crate) ended: Instant,
    /// When its tokens came, where they are streamed.
    pub(crate) tokens: Vec<Instant>,
}

/// What came of a load.
#[derive(Debug, Default)]
pub(crate) struct Report {
    pub(crate) requests: Vec<Request>,
}

/// Runs `clients` clients until a moment; each asks in one of the ways, in turn.
pub(crate) async fn run(client: &Client, asks: &[Ask], clients: usize, expected: &Expected, until: Instant) -> Report {
    let mut running = JoinSet::new();
    // Their connections end with them.
    let client = Client::new(client.base());
    for at in 0..clients {
        let (client, expected, ask) = (client.clone(), expected.clone(), asks[at % asks.len()]);
        running.spawn(async move {
            let mut requests = Vec::new();
            while requests.is_empty() || Instant::now() < until {
                let number = (at * 100_000 + requests.len()) as u64;
                requests.push(one(&client, ask, number, &expected).await);
                // Who is refused does not come back at once.
                if requests.last().is_some_and(|request| request.fault.is_some()) {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
            requests
        });
    }
    let mut report = Report::default();
    while let Some(requests) = running.join_next().await {
        report.requests.extend(requests.unwrap());
    }
    report
}

/// Makes one request.
pub(crate) async fn one(client: &Client, ask: Ask, number: u64, expected: &Expected) -> Request {
    let began = Instant::now();
    let mut request = Request { ask, fault: None, worker: String::new(), began, ended: began, tokens: Vec::new() };
    let made = tokio::time::timeout(PATIENCE, async {
        if ask.is_stream() {
            stream(client, number, expected, &mut request).await
        } else {
            whole(client, number, expected, &mut request).await
        }
    });
    let made = made.await.unwrap_or_else(|_| Err(format!("it hangs: no end within {} s", PATIENCE.as_secs())));
    request.fault = made.err().map(|fault| format!("{ask:?} number {number} at {}: {fault}", request.worker));
    request.ended = Instant::now();
    request
}

async fn whole(client: &Client, number: u64, expected: &Expected, request: &mut Request) -> Result<(), String> {
    let ask = request.ask;
    let body = ask.body(number, expected.tokens).to_string();
    let reply = client.post(ask.path(), body).await;
    request.worker = reply.header("x-dynamo-worker").to_owned();
    if reply.status != 200 {
        return Err(format!("{}: {}", reply.status, reply.text()));
    }
    let answer: Value = serde_json::from_slice(&reply.body).map_err(|error| format!("{error}: {}", reply.text()))?;
    let judged = judge_whole(&answer, ask, expected);
    judged.map_err(|fault| format!("{fault}, in: {answer}"))
}

fn judge_whole(answer: &Value, ask: Ask, expected: &Expected) -> Result<(), String> {
    let choices = answer["choices"].as_array().ok_or("no choices")?;
    if choices.len() != ask.choices() {
        return Err(format!("{} choices", choices.len()));
    }
    for (at, choice) in choices.iter().enumerate() {
        let text = choice["text"].as_str().or(choice["message"]["content"].as_str()).ok_or("a choice without text")?;
        has_all(text, expected)?;
        if choice["finish_reason"] != "length" || choice["index"] != at {
            return Err(format!("finish reason {} of choice {}", choice["finish_reason"], choice["index"]));
        }
        if ask.is_chat() && choice["message"]["role"] != "assistant" {
            return Err(format!("role {}", choice["message"]["role"]));
        }
    }
    judge_usage(&answer["usage"], ask, expected)
}

async fn stream(client: &Client, number: u64, expected: &Expected, request: &mut Request) -> Result<(), String> {
    let ask = request.ask;
    let mut events = client.try_open(ask.path(), &ask.body(number, expected.tokens)).await?;
    request.worker = events.headers.get("x-dynamo-worker").and_then(|name| name.to_str().ok()).unwrap_or_default().to_owned();
    let mut judge = Judge::new(ask);
    let mut said = Vec::new();
    let judged = async {
        while let Some(data) = events.next().await? {
            said.push(data.clone());
            if judge.take(&data, expected)? {
                request.tokens.push(Instant::now());
            }
        }
        judge.end(expected)
    }
    .await;
    // The events around the fault are the last that were read.
    judged.map_err(|fault| {
        format!("{fault}; it had {} events, the last: {}", said.len(), said[said.len().saturating_sub(4)..].join("\n  "))
    })
}

/// Judges a stream event by event.
struct Judge {
    ask: Ask,
    id: Option<String>,
    choices: Vec<Choice>,
    has_usage: bool,
    is_done: bool,
}

#[derive(Clone, Default)]
struct Choice {
    has_role: bool,
    text: String,
    finish: Option<String>,
}

impl Judge {
    fn new(ask: Ask) -> Self {
        Self { ask, id: None, choices: vec![Choice::default(); ask.choices()], has_usage: false, is_done: false }
    }

    /// Takes an event's data; returns whether it has text.
    fn take(&mut self, data: &str, expected: &Expected) -> Result<bool, String> {
        if self.is_done {
            return Err("something after [DONE]".to_owned());
        }
        if data == "[DONE]" {
            self.is_done = true;
            return Ok(false);
        }
        let event: Value = serde_json::from_str(data).map_err(|error| format!("{error}: {data}"))?;
        if !event["error"].is_null() {
            return Err(format!("an error event: {}", event["error"]));
        }
        let id = event["id"].as_str().ok_or("an event without an id")?;
        if self.id.get_or_insert_with(|| id.to_owned()) != id {
            return Err(format!("another id: {id}"));
        }
        if event["model"] != "m" {
            return Err(format!("model {}", event["model"]));
        }
        let mut has_text = false;
        for choice in event["choices"].as_array().ok_or("an event without choices")? {
            has_text |= self.choice(choice)?;
        }
        if !event["usage"].is_null() {
            if std::mem::replace(&mut self.has_usage, true) {
                return Err("usage twice".to_owned());
            }
            judge_usage(&event["usage"], self.ask, expected)?;
        }
        Ok(has_text)
    }

    fn choice(&mut self, choice: &Value) -> Result<bool, String> {
        let at = choice["index"].as_u64().ok_or("a choice without an index")? as usize;
        let known = self.choices.get_mut(at).ok_or_else(|| format!("choice {at}"))?;
        if known.finish.is_some() {
            return Err(format!("something after choice {at} finished"));
        }
        let delta = &choice["delta"];
        if !delta["role"].is_null() && std::mem::replace(&mut known.has_role, true) {
            return Err(format!("the role of choice {at} twice"));
        }
        let text = choice["text"].as_str().or(delta["content"].as_str()).unwrap_or_default();
        if self.ask.is_chat() && !text.is_empty() && !known.has_role {
            return Err(format!("text of choice {at} before its role"));
        }
        known.text.push_str(text);
        if tokens::count(&known.text).is_err() && tokens::count(known.text.trim_end_matches([' ', 't', '🌊'])).is_err() {
            return Err(format!("choice {at}: {}", tokens::count(&known.text).unwrap_err()));
        }
        known.finish = choice["finish_reason"].as_str().map(str::to_owned);
        Ok(!text.is_empty())
    }

    fn end(&self, expected: &Expected) -> Result<(), String> {
        for (at, choice) in self.choices.iter().enumerate() {
            has_all(&choice.text, expected).map_err(|fault| format!("choice {at}: {fault}"))?;
            if choice.finish.as_deref() != Some("length") {
                return Err(format!("choice {at} finished with {:?}", choice.finish));
            }
        }
        if !self.has_usage {
            return Err("no usage".to_owned());
        }
        if self.is_done { Ok(()) } else { Err("no [DONE]".to_owned()) }
    }
}

fn has_all(text: &str, expected: &Expected) -> Result<(), String> {
    match tokens::count(text)? {
        count if count == expected.tokens => Ok(()),
        count => Err(format!("{count} tokens instead of {}", expected.tokens)),
    }
}

fn judge_usage(usage: &Value, ask: Ask, expected: &Expected) -> Result<(), String> {
    let (prompt, completion) = (expected.prompt_tokens[&ask], ask.choices() as u64 * u64::from(expected.tokens));
    let is_right = usage["prompt_tokens"] == prompt
        && usage["completion_tokens"] == completion
        && usage["total_tokens"] == prompt + completion;
    if is_right { Ok(()) } else { Err(format!("usage {usage} instead of {prompt} + {completion}")) }
}

impl Report {
    /// Requests that something was wrong with.
    pub(crate) fn bad(&self) -> Vec<&str> {
        self.requests.iter().filter_map(|request| request.fault.as_deref()).collect()
    }

    /// Checks that all were good.
    #[track_caller]
    pub(crate) fn is_good(&self, what: &str) {
        let bad = self.bad();
        let some = bad.iter().take(3).copied().collect::<Vec<_>>().join("\n\n");
        assert!(bad.is_empty(), "{what}: {} of {} requests were not good:\n{some}", bad.len(), self.requests.len());
    }

    /// The pauses of streams whose worker failed: from the last token before that to the first after it, sorted. `faults`
    /// say when which worker failed; only the first that met a stream counts, since nobody says where it went.
    pub(crate) fn pauses(&self, faults: &[(Instant, String)]) -> Vec<Duration> {
        let mut pauses: Vec<_> = self.requests.iter().filter_map(|request| pause(request, faults)).collect();
        pauses.sort();
        pauses
    }
}

fn pause(request: &Request, faults: &[(Instant, String)]) -> Option<Duration> {
    let met = |(at, worker): &&(Instant, String)| *worker == request.worker && (request.began..request.ended).contains(at);
    let (at, _) = faults.iter().find(met)?;
    let next = request.tokens.iter().position(|token| token > at)?;
    let before = next.checked_sub(1).map_or(request.began, |last| request.tokens[last]);
    Some(request.tokens[next] - before)
}

/// A percentile of sorted times, for people.
pub(crate) fn percentile(sorted: &[Duration], percent: usize) -> String {
    match sorted.get((sorted.len() * percent / 100).min(sorted.len().saturating_sub(1))) {
        Some(time) => format!("{:.0} ms", time.as_secs_f64() * 1000.0),
        None => "-".to_owned(),
    }
}

#[test]
fn a_judge_sees_what_is_wrong() {
    let expected = Expected { tokens: 3, prompt_tokens: BTreeMap::from([(Ask::ChatStream, 5)]) };
    let event = |delta: Value, finish: Value| {
        json!({ "id": "x", "model": "m", "choices": [{ "index": 0, "delta": delta, "finish_reason": finish }] }).to_string()
    };
    let role = || event(json!({ "role": "assistant", "content": "" }), Value::Null);
    let text = |text: &str| event(json!({ "content": text }), Value::Null);
    let last = || event(json!({ "content": " t2" }), "length".into());
    let usage = |completion: u64| {
        let usage = json!({ "prompt_tokens": 5, "completion_tokens": completion, "total_tokens": 5 + completion });
        json!({ "id": "x", "model": "m", "choices": [], "usage": usage }).to_string()
    };
    let done = || "[DONE]".to_owned();
    let judged = |events: &[String]| {
        let mut judge = Judge::new(Ask::ChatStream);
        events.iter().try_for_each(|event| judge.take(event, &expected).map(drop)).and_then(|()| judge.end(&expected))
    };
    let good = [role(), text("t0"), text(" t1"), last(), usage(3), done()];
    assert_eq!(judged(&good), Ok(()));
    let wrong = |at: usize, instead: Vec<String>, says: &str| {
        let mut events = good.to_vec();
        events.splice(at..=at, instead);
        let fault = judged(&events).unwrap_err();
        assert!(fault.contains(says), "{fault}");
    };
    wrong(2, vec![], "expected t1, found \"t2\"");
    wrong(2, vec![text(" t1"), text(" t1")], "expected t2, found \"t1\"");
    wrong(2, vec![text(" t1"), role()], "the role of choice 0 twice");
    wrong(0, vec![], "before its role");
    wrong(3, vec![last(), last()], "after choice 0 finished");
    wrong(3, vec![text(" t2")], "finished with None");
    wrong(4, vec![usage(2)], "usage");
    wrong(4, vec![], "no usage");
    wrong(5, vec![done(), done()], "after [DONE]");
    wrong(5, vec![], "no [DONE]");
    wrong(1, vec![text("t0").replace("\"x\"", "\"y\"")], "another id: y");
    wrong(1, vec![json!({ "error": { "code": "engine_broken" } }).to_string()], "an error event");
}
