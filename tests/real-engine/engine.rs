//! `llama-server` as a process, with what tests ask it.

use std::{env, path::PathBuf, process::Command};

use serde_json::{Value, json};

use crate::harness::{client::Client, eventually, host::Host, process::Process};

/// The model's name.
pub(crate) const MODEL: &str = "tiny-random";

/// A running `llama-server` of two slots with 4,096 tokens each.
pub(crate) struct LlamaServer {
    pub(crate) process: Process,
    pub(crate) http: Client,
}

impl LlamaServer {
    /// Starts one on a free port and waits until it has loaded its model.
    pub(crate) async fn start() -> Self {
        Self::start_with(&["--metrics"]).await
    }

    /// The same with flags of one's own.
    pub(crate) async fn start_with(flags: &[&str]) -> Self {
        let mut command = Command::new(told("DYNAMO_HOST_TEST_LLAMA_SERVER"));
        command.arg("--model").arg(told("DYNAMO_HOST_TEST_LLAMA_MODEL"));
        command.args(["--alias", MODEL, "--host", "127.0.0.1", "--port", "0", "--ctx-size", "8192", "--parallel", "2"]);
        // One thread and no flash attention: answers are then the same, alone or among others.
        command.args(["--threads", "1", "--threads-batch", "1", "--flash-attn", "off", "--slots", "--no-webui", "--jinja"]);
        command.args(flags);
        let process = Process::start("llama-server", &mut command);
        let url = eventually("llama-server says where it listens", async || {
            let log = process.log();
            let line = log.lines().find(|line| line.contains("listening on http://"))?;
            line.split_whitespace().last().map(str::to_owned)
        })
        .await;
        let server = Self { process, http: Client::new(&url) };
        eventually("the model is loaded", async || (server.http.get("/health").await.status == 200).then_some(())).await;
        server
    }

    /// A worker for the host's command line.
    pub(crate) fn worker(&self, name: &str) -> String {
        format!("{},name={name},model={MODEL}", self.http.base())
    }

    /// Slots that are at work.
    pub(crate) async fn running(&self) -> u32 {
        let slots = self.http.get_json("/slots").await;
        slots.as_array().unwrap().iter().filter(|slot| slot["is_processing"] == true).count() as u32
    }

    /// Waits until so many slots are at work.
    pub(crate) async fn runs(&self, slots: u32) {
        eventually(&format!("{slots} slots are at work"), async || (self.running().await == slots).then_some(())).await;
    }
}

fn told(variable: &str) -> PathBuf {
    env::var_os(variable).unwrap_or_else(|| panic!("{variable} is not set; run: cargo xtask real-engine")).into()
}

/// A host over engines that it knows as `a`, `b`, …, with the policy least-loaded.
pub(crate) async fn host_over(engines: &[LlamaServer]) -> Host {
    let workers: Vec<_> = engines.iter().zip("abcdefgh".chars()).map(|(engine, name)| engine.worker(&name.to_string())).collect();
    let routing = crate::harness::components::policy("least-loaded");
    let mut arguments = vec!["--routing", &routing, "--expose-worker"];
    arguments.extend(workers.iter().flat_map(|worker| ["--worker", worker]));
    Host::start(&arguments).await
}

/// A chat, answered in `max_tokens` tokens, the likeliest each time.
pub(crate) fn chat(says: &str, max_tokens: u32) -> Value {
    let messages = json!([{ "role": "user", "content": says }]);
    json!({ "model": MODEL, "messages": messages, "max_tokens": max_tokens, "temperature": 0 })
}

/// A completion of a text or of token ids.
pub(crate) fn completion(prompt: impl Into<Value>, max_tokens: u32) -> Value {
    json!({ "model": MODEL, "prompt": prompt.into(), "max_tokens": max_tokens, "temperature": 0 })
}
