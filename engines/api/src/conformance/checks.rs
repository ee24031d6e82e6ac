//! The checks, one function each, named for what should be true.

use futures_util::future::try_join_all;
use serde_json::{Value, json};

use super::{
    Fixture, Verdict,
    ask::{Asking, OUTPUT_TOKENS, Streamed, ensure, parse_events, request, whole},
};
use crate::{Endpoint, EngineError, Reply, WholeReply, sse::DONE_FRAME};

/// Nothing if it is as it should be, else why not.
pub(super) type Checked = Result<(), Verdict>;

const STREAMS_AT_ONCE: usize = 16;

pub(super) async fn lists_its_model<F: Fixture>(on: &Asking<'_, F>) -> Checked {
    applies(on.can.lists_models, "the engine does not list its models")?;
    let models = on.engine.models().await.map_err(|error| Verdict::Failed(error.to_string()))?;
    ensure(models.iter().any(|card| card.id == on.fixture.model()), || format!("it lists {models:?}"))
}

pub(super) async fn a_probe_finds_it_alive<F: Fixture>(on: &Asking<'_, F>) -> Checked {
    on.engine.probe().await.map_err(|error| Verdict::Failed(error.to_string()))
}

pub(super) async fn a_chat_is_answered_whole<F: Fixture>(on: &Asking<'_, F>) -> Checked {
    let answer = on.whole(Endpoint::ChatCompletions, &on.chat("Say something.")).await?;
    let message = &answer["choices"][0]["message"];
    ensure(message["role"] == "assistant", || format!("the message's role is {}", message["role"]))?;
    ensure(message["content"].is_string(), || format!("the message is {message}"))?;
    is_finished_and_counted(&answer)
}

pub(super) async fn a_chat_is_streamed<F: Fixture>(on: &Asking<'_, F>) -> Checked {
    let asked = on.chat("Tell me of harbours.");
    let streamed = on.stream(Endpoint::ChatCompletions, asked.clone()).await?;
    let roles: Vec<_> = streamed.choices().filter_map(|choice| choice["delta"]["role"].as_str()).collect();
    ensure(roles == ["assistant"], || format!("the roles of its deltas are {roles:?}"))?;
    says_the_same(on, &streamed, Endpoint::ChatCompletions, &asked, "/choices/0/message/content").await
}

pub(super) async fn a_completion_is_answered_whole<F: Fixture>(on: &Asking<'_, F>) -> Checked {
    let answer = on.whole(Endpoint::Completions, &on.completion("Once upon a time")).await?;
    ensure(answer["choices"][0]["text"].is_string(), || format!("the choice is {}", answer["choices"][0]))?;
    is_finished_and_counted(&answer)
}

pub(super) async fn a_completion_is_streamed<F: Fixture>(on: &Asking<'_, F>) -> Checked {
    let asked = on.completion("There was a harbour");
    let streamed = on.stream(Endpoint::Completions, asked.clone()).await?;
    says_the_same(on, &streamed, Endpoint::Completions, &asked, "/choices/0/text").await
}

pub(super) async fn each_chunk_is_whole_events<F: Fixture>(on: &Asking<'_, F>) -> Checked {
    let streamed = on.stream(Endpoint::ChatCompletions, on.chat("Speak slowly.")).await?;
    for chunk in &streamed.chunks {
        let events = chunk.bytes.strip_suffix(DONE_FRAME).filter(|_| chunk.summary.done).unwrap_or(&chunk.bytes);
        parse_events(events)?;
    }
    Ok(())
}

pub(super) async fn a_prompt_of_token_ids_is_taken<F: Fixture>(on: &Asking<'_, F>) -> Checked {
    applies(on.can.token_id_prompts, "the engine takes no token ids")?;
    let ids = [100, 200, 300, 400, 500];
    let answer = on.whole(Endpoint::Completions, &on.completion(json!(ids))).await?;
    is_finished_and_counted(&answer)?;
    let counted = &answer["usage"]["prompt_tokens"];
    ensure(*counted == ids.len(), || format!("of {} ids it counts {counted}", ids.len()))
}

pub(super) async fn a_stream_reports_its_usage<F: Fixture>(on: &Asking<'_, F>) -> Checked {
    applies(on.can.stream_usage, "the engine reports no usage in streams")?;
    let mut asked = on.completion("Count with me");
    asked["stream_options"] = json!({ "include_usage": true });
    let streamed = on.stream(Endpoint::Completions, asked).await?;
    let Some(usage) = streamed.chunks.iter().rev().find_map(|chunk| chunk.summary.usage) else {
        return Err(Verdict::Failed("no usage".into()));
    };
    let counts = usage.prompt_tokens > 0 && (1..=OUTPUT_TOKENS).contains(&usage.completion_tokens);
    ensure(counts, || format!("the usage is {usage:?} where {OUTPUT_TOKENS} tokens were asked for"))
}

pub(super) async fn an_unknown_field_passes<F: Fixture>(on: &Asking<'_, F>) -> Checked {
    applies(on.can.unknown_fields, "the engine refuses fields that it does not know")?;
    let mut asked = on.chat("Say something new.");
    asked["a_field_of_tomorrow"] = json!({ "depth": [1, 2.5, null] });
    on.whole(Endpoint::ChatCompletions, &asked).await.map(drop)
}

pub(super) async fn an_unknown_model_is_refused<F: Fixture>(on: &Asking<'_, F>) -> Checked {
    applies(on.can.refuses_unknown_model, "the engine serves any name")?;
    for stream in [false, true] {
        let mut asked = on.chat("Who are you?");
        asked["model"] = "a-model-that-nobody-serves".into();
        asked["stream"] = stream.into();
        let reply = whole(on.generate(Endpoint::ChatCompletions, asked.to_string(), stream).await?)?;
        ensure(reply.status == 404, || format!("its status is {}", reply.status))?;
        is_an_error_object(&reply)?;
    }
    Ok(())
}

pub(super) async fn a_malformed_body_is_refused<F: Fixture>(on: &Asking<'_, F>) -> Checked {
    let cut_short = r#"{"model": "m", "messages": [{"role""#;
    let reply = whole(on.generate(Endpoint::ChatCompletions, cut_short, false).await?)?;
    let refused = reply.status.is_client_error() || reply.status.is_server_error();
    ensure(refused, || format!("its status is {}", reply.status))?;
    if on.can.error_objects { is_an_error_object(&reply) } else { says_something(&reply) }
}

pub(super) async fn streams_at_once_are_complete<F: Fixture>(on: &Asking<'_, F>) -> Checked {
    let one = async |number: usize| {
        let streamed = on.stream(Endpoint::Completions, on.completion(format!("Stream number {number}"))).await?;
        ensure(!streamed.text().is_empty(), || format!("stream {number} of {STREAMS_AT_ONCE} says nothing"))
    };
    try_join_all((0..STREAMS_AT_ONCE).map(one)).await.map(drop)
}

pub(super) async fn dropping_a_stream_ends_its_work<F: Fixture>(on: &Asking<'_, F>) -> Checked {
    on.wait_until_running(on.fixture.patience(), |running| running == 0).await?;
    let mut asked = on.completion("Never stop");
    asked["max_tokens"] = on.fixture.long_output_tokens().into();
    let chunks = on.open(Endpoint::Completions, asked).await?;
    on.wait_until_running(on.fixture.patience(), |running| running > 0).await?;
    drop(chunks);
    on.wait_until_running(on.fixture.cancels_within(), |running| running == 0).await
}

pub(super) async fn dropping_a_wait_ends_its_work<F: Fixture>(on: &Asking<'_, F>) -> Checked {
    applies(on.can.cancels_whole, "the engine works on although the client left")?;
    on.wait_until_running(on.fixture.patience(), |running| running == 0).await?;
    let mut asked = on.completion("Never stop either");
    asked["max_tokens"] = on.fixture.long_output_tokens().into();
    tokio::select! {
        reply = on.generate(Endpoint::Completions, asked.to_string(), false) => {
            let _: Reply = reply?;
            return Err(Verdict::Failed("the answer came before it was cancelled: ask for more tokens".into()));
        }
        running = on.wait_until_running(on.fixture.patience(), |running| running > 0) => running?,
    }
    on.wait_until_running(on.fixture.cancels_within(), |running| running == 0).await
}

pub(super) async fn a_dead_engine_is_a_failed_connect<F: Fixture>(on: &Asking<'_, F>) -> Checked {
    let Some(engine) = on.fixture.dead_engine() else {
        return Err(Verdict::NotApplicable("the engine has no address"));
    };
    let asked = request(Endpoint::ChatCompletions, on.chat("Hello?").to_string(), false);
    let errors = [engine.generate(asked).await.err(), engine.probe().await.err(), engine.models().await.err()];
    let connects = errors.iter().all(|error| matches!(error, Some(EngineError::Connect { .. })));
    ensure(connects, || format!("a request, a probe and the list of models end with {errors:?}"))
}

pub(super) fn applies(can: bool, otherwise: &'static str) -> Checked {
    if can { Ok(()) } else { Err(Verdict::NotApplicable(otherwise)) }
}

/// A whole answer says why it ended and how long it is.
fn is_finished_and_counted(answer: &Value) -> Checked {
    let reason = &answer["choices"][0]["finish_reason"];
    ensure(reason.is_string(), || format!("its finish reason is {reason}"))?;
    let usage = &answer["usage"];
    let prompt_is_counted = usage["prompt_tokens"].as_u64().is_some_and(|tokens| tokens > 0);
    let output_is_counted = usage["completion_tokens"].as_u64().is_some_and(|n| (1..=u64::from(OUTPUT_TOKENS)).contains(&n));
    ensure(prompt_is_counted && output_is_counted, || format!("its usage is {usage}"))
}

/// A stream says what the whole answer to the same request says, where the engine is repeatable; so nothing was lost,
/// doubled or swapped.
async fn says_the_same<F: Fixture>(
    on: &Asking<'_, F>,
    streamed: &Streamed,
    endpoint: Endpoint,
    asked: &Value,
    text_at: &str,
) -> Checked {
    let text = streamed.text();
    ensure(!text.is_empty(), || "it says nothing".into())?;
    if on.can.deterministic {
        let answer = on.whole(endpoint, asked).await?;
        let whole = answer.pointer(text_at).and_then(Value::as_str);
        ensure(whole == Some(&text), || format!("it says {text:?}, and whole {whole:?}"))?;
    }
    Ok(())
}

/// `{"error": …}` or `{"message": …}` or `{"detail": …}`
fn says_something(reply: &WholeReply) -> Checked {
    let body: Value = serde_json::from_slice(&reply.body).unwrap_or_default();
    let says = ["error", "message", "detail"].iter().any(|&name| !body[name].is_null());
    ensure(says, || format!("no message in {}", String::from_utf8_lossy(&reply.body)))
}

/// `{"error": {"message": …}}`
fn is_an_error_object(reply: &WholeReply) -> Checked {
    let body: Value = serde_json::from_slice(&reply.body).unwrap_or_default();
    let message = body["error"]["message"].as_str().unwrap_or_default();
    ensure(!message.is_empty(), || format!("no message in {}", String::from_utf8_lossy(&reply.body)))
}
