//! Hand-offs between the engines of a pair, in the order of their protocol.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::{
    StreamExt as _,
    future::{join_all, try_join},
};
use http::{HeaderMap, StatusCode};
use serde_json::{Value, json};

use super::{
    Fixture, Verdict,
    ask::{Asking, OUTPUT_TOKENS, ensure, read, request, whole},
    checks::Checked,
};
use crate::{Endpoint, Engine, EngineError, Leg, Prefilled, Reply, Ticket, WholeReply};

const AT_ONCE: usize = 8;

pub(super) async fn a_chat_is_handed_over<F: Fixture>(on: &Asking<'_, F>) -> Checked {
    is_handed_over(
        on,
        Endpoint::ChatCompletions,
        on.chat("Carry this to somebody else, word by word."),
        "/choices/0/message/content",
    )
    .await
}

pub(super) async fn a_completion_is_handed_over<F: Fixture>(on: &Asking<'_, F>) -> Checked {
    is_handed_over(on, Endpoint::Completions, on.completion("It was begun by one and ended by another"), "/choices/0/text").await
}

pub(super) async fn hand_offs_at_once_do_not_meet<F: Fixture>(on: &Asking<'_, F>) -> Checked {
    let pair = Pair::of(on)?;
    let one = async |number: usize| {
        let asked = on.completion(format!("Number {number} of several that are on their way at once"));
        let together = pair.whole(Endpoint::Completions, &asked).await?;
        let alone = pair.whole(Endpoint::Completions, &asked).await?;
        Ok((together["choices"][0]["text"].clone(), alone["choices"][0]["text"].clone()))
    };
    for (number, said) in join_all((0..AT_ONCE).map(one)).await.into_iter().enumerate() {
        let (first, again) = said?;
        ensure(first.is_string() && (first == again || !on.can.deterministic), || {
            format!("number {number} says {first}, then {again}")
        })?;
    }
    Ok(())
}

/// Of sequential protocols, where the answer tells.
pub(super) async fn nothing_left_is_told<F: Fixture>(on: &Asking<'_, F>) -> Checked {
    let pair = Pair::of(on)?;
    if pair.is_concurrent() {
        return Err(Verdict::NotApplicable("both legs are asked at once, and a prefill's answer says nothing"));
    }
    for body in ["", "null", "[]", "{}", r#"{"choices":[{"finish_reason":"length"}]}"#, r#"{"choices":"#] {
        let reply = WholeReply { status: StatusCode::OK, headers: HeaderMap::new(), body: Bytes::from_static(body.as_bytes()) };
        let read = pair.prefill.prefilled(&reply);
        ensure(matches!(read, Err(EngineError::Protocol { .. })), || format!("{body:?} is taken for {read:?}"))?;
    }
    Ok(())
}

/// Whole and streamed, and compared with what nobody handed over where such an engine serves that.
async fn is_handed_over<F: Fixture>(on: &Asking<'_, F>, endpoint: Endpoint, asked: Value, text_at: &str) -> Checked {
    let pair = Pair::of(on)?;
    let answer = pair.whole(endpoint, &asked).await?;
    let text = answer.pointer(text_at).and_then(Value::as_str).unwrap_or_default().to_owned();
    ensure(!text.is_empty(), || format!("it says nothing: {answer}"))?;
    let made = &answer["usage"]["completion_tokens"];
    ensure(made.as_u64().is_some_and(|made| (1..=u64::from(OUTPUT_TOKENS)).contains(&made)), || {
        format!("it counts {made} tokens")
    })?;

    let mut streaming = asked.clone();
    streaming["stream"] = true.into();
    streaming["stream_options"] = json!({ "include_usage": true });
    let streamed = match pair.asked(endpoint, &streaming, true).await? {
        Reply::Stream(chunks) => read(chunks).await?,
        Reply::Whole(reply) => {
            return Err(Verdict::Failed(format!("no stream but {}: {}", reply.status, String::from_utf8_lossy(&reply.body))));
        }
    };
    let counted = streamed.chunks.iter().rev().find_map(|chunk| chunk.summary.usage).map(|usage| u64::from(usage.prompt_tokens));
    let prompt = answer["usage"]["prompt_tokens"].as_u64();
    ensure(counted == prompt, || format!("its prompt has {counted:?} tokens in a stream, and {prompt:?} whole"))?;
    if !on.can.deterministic {
        return Ok(());
    }
    let said = streamed.text();
    ensure(said == text, || format!("it says {said:?} in a stream, and {text:?} whole"))?;
    if pair.prefill.handoff().is_some_and(crate::Protocol::serves_whole) {
        let reply = send(&pair.prefill, Leg::Whole, endpoint, &asked, false).await?;
        let alone: Value = serde_json::from_slice(&whole(reply)?.body).unwrap_or_default();
        let said = alone.pointer(text_at).and_then(Value::as_str);
        ensure(said == Some(&text), || format!("one engine says {said:?}, and two {text:?}"))?;
        ensure(alone["usage"]["prompt_tokens"].as_u64() == prompt, || {
            format!("of {prompt:?} prompt tokens one engine counts {}", alone["usage"])
        })?;
    }
    Ok(())
}

/// Two engines, and the order in which they are asked.
struct Pair {
    prefill: Arc<dyn Engine>,
    decode: Arc<dyn Engine>,
}

impl Pair {
    fn of<F: Fixture>(on: &Asking<'_, F>) -> Result<Self, Verdict> {
        let Some((prefill, decode)) = on.fixture.pair() else {
            return Err(Verdict::NotApplicable("there is no pair of such engines that hands over"));
        };
        let (gives, takes) = (prefill.handoff(), decode.handoff());
        ensure(gives.is_some() && gives == takes, || format!("one hands over by {gives:?}, the other by {takes:?}"))?;
        Ok(Self { prefill, decode })
    }

    fn is_concurrent(&self) -> bool {
        self.prefill.handoff().is_some_and(crate::Protocol::is_concurrent)
    }

    async fn whole(&self, endpoint: Endpoint, asked: &Value) -> Result<Value, Verdict> {
        let reply = whole(self.asked(endpoint, asked, false).await?)?;
        ensure(reply.status == 200, || format!("{}: {}", reply.status, String::from_utf8_lossy(&reply.body)))?;
        serde_json::from_slice(&reply.body).map_err(|error| Verdict::Failed(format!("not JSON: {error}")))
    }

    /// The answer of whoever decodes, or of who prefilled where that is all.
    async fn asked(&self, endpoint: Endpoint, asked: &Value, stream: bool) -> Result<Reply, Verdict> {
        if self.is_concurrent() {
            let ticket = self.prefill.ticket(None).await.map_err(|error| Verdict::Failed(error.to_string()))?;
            let prefill = async {
                let reply = send(&self.prefill, Leg::Prefill(Some(ticket.clone())), endpoint, asked, stream).await?;
                drain(reply).await
            };
            let decode = send(&self.decode, Leg::Decode(ticket.clone()), endpoint, asked, stream);
            return try_join(prefill, decode).await.map(|((), reply)| reply);
        }
        let reply = whole(send(&self.prefill, Leg::Prefill(None), endpoint, asked, stream).await?)?;
        ensure(reply.status == 200, || format!("prefill: {}: {}", reply.status, String::from_utf8_lossy(&reply.body)))?;
        match self.prefill.prefilled(&reply) {
            Ok(Prefilled::Ready(ticket)) => self.decoded(ticket, endpoint, asked, stream).await,
            Ok(Prefilled::Final) => Ok(Reply::Whole(reply)),
            Err(error) => Err(Verdict::Failed(error.to_string())),
        }
    }

    async fn decoded(&self, ticket: Ticket, endpoint: Endpoint, asked: &Value, stream: bool) -> Result<Reply, Verdict> {
        send(&self.decode, Leg::Decode(ticket), endpoint, asked, stream).await
    }
}

async fn send(engine: &Arc<dyn Engine>, leg: Leg, endpoint: Endpoint, asked: &Value, stream: bool) -> Result<Reply, Verdict> {
    let mut request = request(endpoint, asked.to_string(), stream);
    request.leg = leg;
    engine.generate(request).await.map_err(|error| Verdict::Failed(error.to_string()))
}

/// Reads an answer that is for nobody.
async fn drain(reply: Reply) -> Checked {
    match reply {
        Reply::Whole(reply) => {
            ensure(reply.status == 200, || format!("prefill: {}: {}", reply.status, String::from_utf8_lossy(&reply.body)))
        }
        Reply::Stream(mut chunks) => {
            while let Some(chunk) = chunks.next().await {
                chunk.map_err(|error| Verdict::Failed(error.to_string()))?;
            }
            Ok(())
        }
    }
}
