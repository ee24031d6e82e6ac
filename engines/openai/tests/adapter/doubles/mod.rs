//! Doubles of real servers: each kind's paths, shapes, refusals and quirks, over real sockets.
//!
//! vLLM's, llama.cpp's and `transformers serve`'s shapes are captured (`fixtures/`); SGLang's and TensorRT-LLM's are from
//! their sources, since no such server has been at hand. A double is as strict as the real one where the adapter could be
//! refused, and as slow to cancel. What it generates is words that follow from the prompt alone.

mod generation;
mod llamacpp;
mod sglang;
mod shapes;
mod transformers;
mod trtllm;
mod vllm;

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicU32, AtomicU64, Ordering},
};

use serde_json::Value;

pub(crate) use self::{llamacpp::Llamacpp, sglang::Sglang, transformers::Transformers, trtllm::Trtllm, vllm::Vllm};
use crate::scripted::{Connection, Received, Scripted, whole_answer};

/// The model that all of them serve.
pub(crate) const MODEL: &str = "tiny-qwen3";

/// A whole answer: status line and JSON.
pub(crate) type Answer = (&'static str, String);

/// What one kind of server does in its own way.
pub(crate) trait Manners: Send + Sync + 'static {
    /// Answers what is not generation; nothing if there is no such path.
    fn answer(&self, at_work: &AtWork, line: &str, body: &str) -> Option<Answer>;

    /// Refuses a request for generation.
    fn refusal(&self, body: Option<&Value>) -> Option<Answer>;

    /// The JSON of what it generates.
    fn shapes(&self) -> &shapes::Shapes;

    /// Whether a stream ends with `[DONE]`.
    fn says_done(&self) -> bool {
        true
    }

    /// Whether it closes the connection after a stream, without a word.
    fn closes_after_streams(&self) -> bool {
        false
    }

    /// What it does about a client that left.
    fn client_left(&self, _stream: bool) -> Left {
        Left::Stops
    }

    /// The work changed.
    fn worked(&self, _at_work: &AtWork) {}
}

/// What happens to a request whose client left.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Left {
    /// It ends at once.
    Stops,
    /// It runs on to its end.
    RunsOn,
    /// It ends after 2 s, or when told to abort.
    NoticedLate,
}

/// What a double works on, and what it was asked.
#[derive(Default)]
pub(crate) struct AtWork {
    running: AtomicU32,
    pub(crate) tokens: AtomicU64,
    /// Every request, in order.
    pub(crate) asked: Mutex<Vec<Received>>,
    /// Ids whose requests shall end.
    pub(crate) aborted: Mutex<Vec<String>>,
}

impl AtWork {
    pub(crate) fn running(&self) -> u32 {
        self.running.load(Ordering::SeqCst)
    }

    /// How often a path was asked.
    pub(crate) fn times(&self, path: &str) -> usize {
        let asked = self.asked.lock().unwrap();
        asked.iter().filter(|request| request.head.split_whitespace().nth(1) == Some(path)).count()
    }

    /// The bodies that a path was sent.
    pub(crate) fn bodies(&self, path: &str) -> Vec<String> {
        let asked = self.asked.lock().unwrap();
        let to_path = asked.iter().filter(|request| request.head.split_whitespace().nth(1) == Some(path));
        to_path.map(|request| request.body.clone()).collect()
    }
}

/// A running double.
pub(crate) struct Double {
    pub(crate) server: Scripted,
    pub(crate) at_work: Arc<AtWork>,
}

impl Double {
    pub(crate) async fn start(manners: impl Manners) -> Self {
        let (manners, at_work) = (Arc::new(manners), Arc::new(AtWork::default()));
        let state = at_work.clone();
        let server = Scripted::start(move |connection| serve(connection, manners.clone(), state.clone())).await;
        Self { server, at_work }
    }
}

async fn serve(mut connection: Connection, manners: Arc<impl Manners>, at_work: Arc<AtWork>) {
    while let Some(request) = connection.request().await {
        at_work.asked.lock().unwrap().push(request.clone());
        let line = request.head.lines().next().unwrap_or_default().trim_end_matches(" http/1.1");
        let chat = match line {
            "post /v1/chat/completions" => true,
            "post /v1/completions" => false,
            _ => {
                let missing = || ("404 Not Found", r#"{"detail":"Not Found"}"#.to_owned());
                let (status, body) = manners.answer(&at_work, line, &request.body).unwrap_or_else(missing);
                connection.write(whole_answer(status, &body)).await;
                continue;
            }
        };
        let body: Option<Value> = serde_json::from_str(&request.body).ok();
        match (manners.refusal(body.as_ref()), body) {
            (None, Some(body)) => {
                let goes_on = generation::answer(&mut connection, &*manners, &at_work, chat, &body).await;
                if !goes_on {
                    return;
                }
            }
            (refusal, _) => {
                let (status, body) = refusal.expect("a body that is not JSON is refused");
                connection.write(whole_answer(status, &body)).await;
            }
        }
    }
}
