//! TensorRT-LLM's `trtllm-serve` with a cache transceiver, after its source: a context, then its generation.
//!
//! What it does not know it refuses, within its parameters, too. Its state is signed: a changed byte is a fault.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use serde_json::{Value, json, value::RawValue};

use super::{
    MODEL, Network, Part, UntilTheEnd,
    server::{Answer, Asked, Manners, Server},
    speech::Speech,
};

/// What its models of a request know, as far as clients of tests send it.
const KNOWN: [&str; 15] = [
    "model",
    "messages",
    "prompt",
    "prompt_token_ids",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "n",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "ignore_eos",
    "disaggregated_params",
];
const KNOWN_PARAMS: [&str; 7] = [
    "request_type",
    "first_gen_tokens",
    "ctx_request_id",
    "encoded_opaque_state",
    "draft_tokens",
    "disagg_request_id",
    "ctx_dp_rank",
];
/// A prompt with this word is answered in one token, which the context makes.
pub(crate) const AT_ONCE: &str = "at-once";

/// Contexts by the ids of their requests.
#[derive(Default)]
pub(crate) struct Contexts(HashMap<u64, Context>);

struct Context {
    ids: Vec<u32>,
    /// What follows the type in its parameters, to the last byte.
    signed: String,
    generated: bool,
}

/// A running double.
pub(crate) struct Trtllm {
    server: Server,
    manners: Arc<Engine>,
}

struct Engine {
    network: Arc<Network<Contexts>>,
    part: Part,
    asked: AtomicUsize,
}

impl Trtllm {
    pub(crate) async fn start(part: Part, network: &Arc<Network<Contexts>>) -> Self {
        let manners = Arc::new(Engine { network: Arc::clone(network), part, asked: AtomicUsize::new(0) });
        Self { server: Server::start(Arc::clone(&manners)).await, manners }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.server.address)
    }

    /// Requests for tokens so far.
    pub(crate) fn asked(&self) -> usize {
        self.manners.asked.load(Ordering::SeqCst)
    }
}

impl Manners for Engine {
    async fn answer(self: Arc<Self>, asked: Asked) -> Answer {
        let ok = |body: Value| Answer::Whole("200 OK", body.to_string());
        match asked.line.as_str() {
            "get /health" => ok(json!({})),
            "get /v1/models" => {
                ok(json!({ "object": "list", "data": [{ "id": MODEL, "object": "model", "owned_by": "tensorrt_llm" }] }))
            }
            "get /metrics" => {
                ok(json!([{ "numActiveRequests": 0, "kvCacheStats": { "maxNumBlocks": 1000, "tokensPerBlock": 32 } }]))
            }
            "post /v1/chat/completions" => self.generate(true, &asked.body),
            "post /v1/completions" => self.generate(false, &asked.body),
            _ => Answer::Whole("404 Not Found", r#"{"detail":"Not Found"}"#.to_owned()),
        }
    }
}

impl Engine {
    fn generate(&self, chat: bool, text: &str) -> Answer {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let Ok(body) = serde_json::from_str::<Value>(text) else { return refusal("[{'type': 'json_invalid'}]") };
        let unknown = |object: &Value, known: &[&str]| {
            object.as_object().and_then(|object| object.keys().find(|name| !known.contains(&name.as_str())).cloned())
        };
        let params = &body["disaggregated_params"];
        if let Some(name) = unknown(&body, &KNOWN).or_else(|| unknown(params, &KNOWN_PARAMS)) {
            self.network.fault(format!("it was sent {name}, which it does not know"));
            return refusal(&format!("[{{'type': 'extra_forbidden', 'loc': ('body', '{name}')}}]"));
        }
        let mut speech = Speech::read(chat, &body);
        if !body["prompt_token_ids"].is_null() {
            speech.ids = serde_json::from_value(body["prompt_token_ids"].clone()).unwrap();
        }
        match (self.part, params["request_type"].as_str()) {
            (_, None) => {}
            (Part::Prefill, Some("context_only")) => return self.context(&speech, &body),
            (Part::Decode, Some("generation_only")) => {
                if let Err(reason) = self.generation(&speech, text, params) {
                    self.network.fault(reason.clone());
                    return refusal(&reason);
                }
            }
            (part, Some(other)) => {
                self.network.fault(format!("the {part:?} engine was asked for {other}"));
                return refusal("the request's type is not what it is here for");
            }
        }
        if speech.stream {
            let end = UntilTheEnd::of(&self.network);
            return Answer::Stream(speech.events(speech.max_tokens), speech.pace(), Box::new(move || end.came()));
        }
        Answer::Whole("200 OK", speech.whole(speech.max_tokens, "length").to_string())
    }

    fn context(&self, speech: &Speech, body: &Value) -> Answer {
        if speech.stream || !body["stream_options"].is_null() {
            self.network.fault("a context was asked for as a stream");
            return refusal("a context is no stream");
        }
        let is_short = body.to_string().contains(AT_ONCE);
        let mut answer = speech.whole(1, if is_short { "stop" } else { "length" });
        answer["prompt_token_ids"] = json!(speech.ids);
        if is_short {
            return Answer::Whole("200 OK", answer.to_string());
        }
        let mut contexts = self.network.here.lock().unwrap();
        let id = u64::MAX - contexts.0.len() as u64;
        // As no JSON library writes it.
        let signed = format!(
            r#""first_gen_tokens" : [7],"ctx_request_id":{id},"encoded_opaque_state":"q80\/{id:x}+\u003d=" ,"draft_tokens":null"#
        );
        contexts.0.insert(id, Context { ids: speech.ids.clone(), signed: signed.clone(), generated: false });
        let params = format!(r#"{{"request_type":"context_only",{signed}}}"#);
        answer["choices"][0]["disaggregated_params"] = "HERE".into();
        Answer::Whole("200 OK", answer.to_string().replace("\"HERE\"", &params))
    }

    fn generation(&self, speech: &Speech, text: &str, params: &Value) -> Result<(), String> {
        let raw: BTreeMap<String, Box<RawValue>> = serde_json::from_str(text).unwrap();
        let said = raw["disaggregated_params"].get();
        let mut contexts = self.network.here.lock().unwrap();
        let context = params["ctx_request_id"].as_u64().and_then(|id| contexts.0.get_mut(&id));
        let context = context.ok_or_else(|| format!("there is no such context: {said}"))?;
        let is_signed = said.strip_suffix('}').is_some_and(|said| said.ends_with(&context.signed));
        match () {
            () if !is_signed => Err(format!("the state's signature is wrong: {said}")),
            () if context.ids != speech.ids => Err("the generation has another prompt than its context".to_owned()),
            () if std::mem::replace(&mut context.generated, true) => Err("a context is used a second time".to_owned()),
            () => {
                self.network.handed();
                Ok(())
            }
        }
    }
}

fn refusal(message: &str) -> Answer {
    Answer::Whole("400 Bad Request", json!({ "error": message }).to_string())
}
