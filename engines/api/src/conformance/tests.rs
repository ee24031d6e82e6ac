//! The suite against a stub: it passes a sound adapter, and each fault makes the check fail that is there for it.

use std::sync::atomic::{AtomicU32, Ordering};

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use http::{HeaderMap, HeaderValue, StatusCode, header::CONTENT_TYPE};
use serde_json::{Value, json};

use super::*;
use crate::{
    Chunk, Endpoint, EngineError, GenerateRequest, Leg, ModelCard, Prefilled, Protocol, RankLoad, Reply, Ticket, WholeReply,
};

/// What the stub does wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    Dead,
    ListsAnother,
    TwoRoles,
    SwapsTokens,
    LosesDone,
    GoesOnAfterDone,
    CutsFrames,
    NoUsage,
    MiscountsIds,
    RefusesUnknownFields,
    AnyModel,
    AnyBody,
    FinishesTwice,
    WorksOnAfterDrop,
    Hangs,
    OneEmbedding,
    NoMessage,
    NoCount,
    NoResponse,
    FreerThanEmpty,
    AlwaysBusy,
    ForgetsItsPrompt,
    KeepsNothing,
    TakesAnything,
}

struct Stub {
    fault: Fault,
    running: Arc<AtomicU32>,
}

/// One request's place in the count of running ones.
struct Running(Arc<AtomicU32>, Fault);

impl Drop for Running {
    fn drop(&mut self) {
        if self.1 != Fault::WorksOnAfterDrop {
            self.0.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Stub {
    fn connect(&self) -> EngineError {
        EngineError::Connect { engine: "stub".into(), reason: "nobody listens".into() }
    }

    fn refusal(&self, asked: Option<&Value>) -> Option<StatusCode> {
        let Some(asked) = asked else { return (self.fault != Fault::AnyBody).then_some(StatusCode::BAD_REQUEST) };
        if asked["model"] != "m" && self.fault != Fault::AnyModel {
            return Some(StatusCode::NOT_FOUND);
        }
        let refuses = self.fault == Fault::RefusesUnknownFields && asked.get("a_field_of_tomorrow").is_some();
        refuses.then_some(StatusCode::BAD_REQUEST)
    }

    /// The answer of an endpoint that is neither chat nor completion.
    fn other(&self, endpoint: Endpoint) -> Option<Value> {
        let usage = json!({ "input_tokens": 3, "output_tokens": 1 });
        let content = json!([{ "type": "text", "text": "w" }]);
        let answer = match endpoint {
            Endpoint::ChatCompletions | Endpoint::Completions => return None,
            Endpoint::Embeddings => {
                let vectors = if self.fault == Fault::OneEmbedding { 1 } else { 2 };
                json!({ "data": vec![json!({ "embedding": [0.5, 1] }); vectors] })
            }
            Endpoint::Messages if self.fault == Fault::NoMessage => json!({ "type": "message", "content": [] }),
            Endpoint::Messages => json!({ "type": "message", "content": content, "stop_reason": "end_turn", "usage": usage }),
            Endpoint::CountTokens => json!({ "input_tokens": if self.fault == Fault::NoCount { 0 } else { 3 } }),
            Endpoint::Responses if self.fault == Fault::NoResponse => json!({ "object": "response", "output": [] }),
            Endpoint::Responses => json!({ "object": "response", "output": [{ "content": content }], "usage": usage }),
        };
        Some(answer)
    }

    /// The events of an answer of `tokens` tokens.
    fn events(&self, chat: bool, usage: &Value, tokens: u64) -> Vec<String> {
        let choice = |text: String, finish: Value| match chat {
            true => json!({ "choices": [{ "index": 0, "delta": { "content": text }, "finish_reason": finish }] }),
            false => json!({ "choices": [{ "index": 0, "text": text, "finish_reason": finish }] }),
        };
        let role = json!({ "choices": [{ "index": 0, "delta": { "role": "assistant" }, "finish_reason": null }] });
        let roles = if self.fault == Fault::TwoRoles { 2 } else { 1 };
        let mut events: Vec<_> = if chat { vec![role; roles] } else { Vec::new() };
        events.extend((0..tokens).map(|token| choice(format!("w{token} "), Value::Null)));
        if self.fault == Fault::SwapsTokens && tokens > 3 {
            let last = events.len() - 1;
            events.swap(last, last - 1);
        }
        let finishes = if self.fault == Fault::FinishesTwice { 2 } else { 1 };
        events.extend(vec![choice(String::new(), "length".into()); finishes]);
        if self.fault != Fault::NoUsage {
            events.push(json!({ "choices": [], "usage": usage }));
        }
        let mut events: Vec<_> = events.iter().map(|event| format!("data: {event}\n\n")).collect();
        if self.fault != Fault::LosesDone {
            events.push("data: [DONE]\n\n".into());
        }
        if self.fault == Fault::GoesOnAfterDone {
            events.push(": ping\n\n".into());
        }
        events
    }
}

impl Engine for Stub {
    fn kind(&self) -> &'static str {
        "stub"
    }

    fn models(&self) -> BoxFuture<'_, Result<Vec<ModelCard>, EngineError>> {
        Box::pin(async {
            let id = if self.fault == Fault::ListsAnother { "another" } else { "m" };
            if self.fault == Fault::Dead {
                return Err(self.connect());
            }
            Ok(vec![ModelCard { id: id.into(), max_model_len: None, parent: None }])
        })
    }

    fn probe(&self) -> BoxFuture<'_, Result<(), EngineError>> {
        Box::pin(async { if self.fault == Fault::Dead { Err(self.connect()) } else { Ok(()) } })
    }

    fn load(&self) -> BoxFuture<'_, Result<Vec<RankLoad>, EngineError>> {
        Box::pin(async {
            let running = self.running.load(Ordering::Relaxed) + u32::from(self.fault == Fault::AlwaysBusy);
            let kv_tokens_free = Some(if self.fault == Fault::FreerThanEmpty { 101 } else { 99 });
            Ok(vec![RankLoad { running: Some(running), kv_tokens_total: Some(100), kv_tokens_free, ..RankLoad::default() }])
        })
    }

    fn handoff(&self) -> Option<Protocol> {
        Some(Protocol::Nixl)
    }

    fn prefilled(&self, reply: &WholeReply) -> Result<Prefilled, EngineError> {
        let kept = reply.body.starts_with(b"{\"kept\":true") || self.fault == Fault::TakesAnything;
        if !kept {
            return Err(EngineError::Protocol { engine: "stub".into(), reason: "nothing is kept".into() });
        }
        let state = serde_json::value::to_raw_value(&json!({})).unwrap().into();
        let ticket = Ticket { protocol: Protocol::Nixl, state, prompt_ids: None, cached_tokens: None, bytes: None };
        Ok(Prefilled::Ready(ticket))
    }

    fn generate(&self, request: GenerateRequest) -> BoxFuture<'_, Result<Reply, EngineError>> {
        Box::pin(async move {
            if matches!(request.leg, Leg::Prefill(_)) {
                return Ok(whole(StatusCode::OK, &json!({ "kept": self.fault != Fault::KeepsNothing })));
            }
            match self.fault {
                Fault::Dead => return Err(self.connect()),
                Fault::Hangs => std::future::pending().await,
                _ => {}
            }
            let asked: Option<Value> = serde_json::from_slice(&request.body).ok();
            if let Some(status) = self.refusal(asked.as_ref()) {
                return Ok(whole(status, &json!({ "error": { "message": "no" } })));
            }
            let asked = asked.unwrap_or_default();
            if let Some(answer) = self.other(request.endpoint) {
                return Ok(whole(StatusCode::OK, &answer));
            }
            self.running.fetch_add(1, Ordering::Relaxed);
            let running = Running(self.running.clone(), self.fault);
            let tokens = asked["max_tokens"].as_u64().unwrap_or(1);
            let forgets = self.fault == Fault::ForgetsItsPrompt && matches!(request.leg, Leg::Decode(_));
            let prompt_tokens =
                asked["prompt"].as_array().map_or(3, Vec::len) - usize::from(self.fault == Fault::MiscountsIds || forgets);
            let usage = json!({ "prompt_tokens": prompt_tokens, "completion_tokens": tokens });
            let chat = request.endpoint == Endpoint::ChatCompletions;
            if request.stream {
                let mut pieces = self.events(chat, &usage, tokens);
                if self.fault == Fault::CutsFrames {
                    pieces = pieces.iter().flat_map(|event| [event[..9].to_owned(), event[9..].to_owned()]).collect();
                }
                let chunks = stream::iter(pieces).map(move |piece| {
                    let _until_the_stream_ends = &running;
                    Ok(Chunk::new(Bytes::from(piece)))
                });
                return Ok(Reply::Stream(chunks.boxed()));
            }
            if tokens > 1000 {
                // So long that the suite gives up first.
                std::future::pending::<()>().await;
            }
            let text: String = (0..tokens).map(|token| format!("w{token} ")).collect();
            let choice = json!({ "message": { "role": "assistant", "content": text }, "text": text, "finish_reason": "length" });
            Ok(whole(StatusCode::OK, &json!({ "choices": [choice], "usage": usage })))
        })
    }
}

fn whole(status: StatusCode, body: &Value) -> Reply {
    let headers = HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static("application/json"))]);
    Reply::Whole(WholeReply { status, headers, body: body.to_string().into() })
}

struct StubFixture {
    stub: Arc<Stub>,
    can: Capabilities,
}

impl StubFixture {
    fn new(fault: Fault) -> Self {
        let stub = Arc::new(Stub { fault, running: Arc::default() });
        Self { stub, can: Capabilities { reports_load: true, offers: &Endpoint::ALL, ..Capabilities::default() } }
    }
}

impl Fixture for StubFixture {
    fn engine(&self) -> Arc<dyn Engine> {
        self.stub.clone()
    }

    fn model(&self) -> &str {
        "m"
    }

    async fn running(&self) -> Option<u32> {
        Some(self.stub.running.load(Ordering::Relaxed))
    }

    fn dead_engine(&self) -> Option<Arc<dyn Engine>> {
        Some(Arc::new(Stub { fault: Fault::Dead, running: Arc::default() }))
    }

    fn pair(&self) -> Option<(Arc<dyn Engine>, Arc<dyn Engine>)> {
        Some((self.stub.clone(), self.stub.clone()))
    }

    fn capabilities(&self) -> Capabilities {
        self.can
    }

    fn cancels_within(&self) -> Duration {
        Duration::from_millis(20)
    }

    fn patience(&self) -> Duration {
        Duration::from_millis(if matches!(self.stub.fault, Fault::Hangs | Fault::WorksOnAfterDrop | Fault::AlwaysBusy) {
            50
        } else {
            5_000
        })
    }
}

#[tokio::test]
async fn a_sound_adapter_conforms() {
    assert_conforms(&StubFixture::new(Fault::None)).await;
}

#[track_caller]
fn fails(report: &Report, fault: Fault, check: &str) {
    let found = report.failures().any(|outcome| outcome.check.contains(check));
    assert!(found, "{fault:?} should fail `{check}`\n{report}");
}

#[tokio::test]
async fn each_fault_fails_its_check() {
    for (fault, check) in [
        (Fault::Dead, "a probe finds it alive"),
        (Fault::ListsAnother, "lists its model"),
        (Fault::TwoRoles, "with one role"),
        (Fault::SwapsTokens, "a completion is streamed"),
        (Fault::LosesDone, "16 streams at once"),
        (Fault::GoesOnAfterDone, "a completion is streamed"),
        (Fault::CutsFrames, "whole server-sent events"),
        (Fault::NoUsage, "reports its usage"),
        (Fault::MiscountsIds, "token ids"),
        (Fault::RefusesUnknownFields, "a field that nobody knows"),
        (Fault::AnyModel, "an unknown model"),
        (Fault::AnyBody, "a malformed body"),
        (Fault::FinishesTwice, "a chat is streamed"),
        (Fault::WorksOnAfterDrop, "ends its work"),
        (Fault::Hangs, "a chat is answered whole"),
        (Fault::OneEmbedding, "embeddings are answered"),
        (Fault::NoMessage, "a message of Anthropic's API"),
        (Fault::NoCount, "tokens are counted"),
        (Fault::NoResponse, "a response of OpenAI's newer API"),
        (Fault::FreerThanEmpty, "it tells its load"),
        (Fault::AlwaysBusy, "a stream shows in its load"),
        (Fault::ForgetsItsPrompt, "a chat is handed over"),
        (Fault::KeepsNothing, "a completion is handed over"),
        (Fault::KeepsNothing, "hand-offs at once"),
        (Fault::TakesAnything, "left nothing is told"),
    ] {
        let report = run(&StubFixture::new(fault)).await;
        fails(&report, fault, check);
    }
}

#[tokio::test]
async fn what_an_engine_cannot_do_is_not_held_against_it() {
    let mut fixture = StubFixture::new(Fault::AnyModel);
    fixture.can.refuses_unknown_model = false;
    let report = run(&fixture).await;
    assert_eq!(report.failures().count(), 0, "{report}");
    assert!(report.to_string().contains("n/a     an unknown model is a 404 with an error object: the engine serves any name"));
}

#[tokio::test]
#[should_panic(expected = "FAILED  it lists its model: it lists [ModelCard { id: \"another\"")]
async fn an_adapter_that_does_not_conform_is_told_all() {
    assert_conforms(&StubFixture::new(Fault::ListsAnother)).await;
}
