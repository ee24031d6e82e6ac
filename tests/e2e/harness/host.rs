//! The host under test, and mock engines as processes of their own.

use hyper::{Method, StatusCode, body::Bytes};
use serde_json::{Value, json};

use super::{
    client::{Client, Reply},
    eventually, own_address,
    process::{Finished, Process, dynamo_host, run},
};

/// A running `dynamo-host serve`.
pub(crate) struct Host {
    pub(crate) process: Process,
    pub(crate) http: Client,
    pub(crate) admin: Client,
}

impl Host {
    /// Starts a host on free ports and waits until all of its workers are healthy.
    pub(crate) async fn start(arguments: &[&str]) -> Self {
        let host = Self::start_anyhow(arguments).await;
        host.workers_are("healthy").await;
        host
    }

    /// Starts a host on free ports, with workers or without.
    pub(crate) async fn start_anyhow(arguments: &[&str]) -> Self {
        let mut all = vec!["serve", "--http", "127.0.0.1:0", "--admin", "127.0.0.1:0"];
        all.extend(arguments);
        let mut process = Process::start("dynamo-host serve", &mut dynamo_host(&all));
        let http = Client::new(&process.listener("front door listening on http://").await);
        let admin = Client::new(&process.listener("admin listening on http://").await);
        Self { process, http, admin }
    }

    /// Starts a host with a configuration file of this text.
    pub(crate) async fn configured(text: &str, arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("host.toml");
        std::fs::write(&file, text).unwrap();
        Self::start(&[&["--config", file.to_str().unwrap()], arguments].concat()).await
    }

    /// A host over mock engines in its process: `mock://a?PARAMETERS`, `mock://b?…`, all of model `m`.
    pub(crate) async fn over_mocks(names: &[&str], parameters: &str, arguments: &[&str]) -> Self {
        let workers: Vec<_> = names.iter().map(|name| format!("mock://{name}?model=m&{parameters}")).collect();
        let mut all = arguments.to_vec();
        all.extend(workers.iter().flat_map(|worker| ["--worker", worker]));
        Self::start(&all).await
    }

    /// Waits until all workers are in a state.
    pub(crate) async fn workers_are(&self, state: &str) {
        eventually(&format!("all workers are {state}"), async || {
            let status = self.admin.get_json("/v1/status").await;
            let workers = status["workers"].as_array().unwrap_or_else(|| panic!("no workers in {status}"));
            workers.iter().all(|worker| worker["state"] == state).then_some(())
        })
        .await;
    }

    /// Activates a policy by the admin API.
    pub(crate) async fn activate(&self, file: &str, settings: &Value) {
        let bytes = std::fs::read(file).unwrap();
        let reply = self.put_policy(bytes, &settings.to_string()).await;
        assert!(reply.status.is_success(), "{file} {settings}: {}", reply.text());
    }

    /// Sends a policy to the admin API.
    pub(crate) async fn put_policy(&self, bytes: Vec<u8>, settings: &str) -> Reply {
        let path = format!("/v1/slots/routing/policy?settings={}", url_encoded(settings));
        self.admin.send(Method::PUT, &path, &[], bytes).await
    }

    /// Puts the native fallback in.
    pub(crate) async fn activate_native(&self) {
        let reply = self.admin.send(Method::DELETE, "/v1/slots/routing/policy", &[], Bytes::new()).await;
        assert!(reply.status.is_success(), "{}", reply.text());
    }

    pub(crate) async fn roll_back(&self) -> Reply {
        self.admin.send(Method::POST, "/v1/slots/routing/rollback", &[], Bytes::new()).await
    }

    /// The routing slot's report.
    pub(crate) async fn slot(&self) -> Value {
        let all = self.admin.get_json("/v1/slots").await;
        let slots = all["slots"].as_array().unwrap_or_else(|| panic!("no slots in {all}"));
        slots.iter().find(|slot| slot["slot"] == "routing").unwrap_or_else(|| panic!("no routing slot in {all}")).clone()
    }

    /// The active routing policy.
    pub(crate) async fn active(&self) -> String {
        self.slot().await["active"]["policy"].as_str().unwrap().to_owned()
    }

    /// Runs a command of the CLI against it.
    pub(crate) async fn cli(&self, arguments: &[&str]) -> Finished {
        let mut all = arguments.to_vec();
        all.extend(["--admin", self.admin.base()]);
        run(&all).await
    }

    /// A short request of `max_tokens` tokens, served whole and well; returns the reply.
    pub(crate) async fn serves(&self, max_tokens: u32) -> Reply {
        let reply = self.http.ask("/v1/completions", &completion(max_tokens)).await;
        assert_eq!(dynamo_engine_mock::tokens::count(reply.json()["choices"][0]["text"].as_str().unwrap()), Ok(max_tokens));
        reply
    }

    /// Checks that it lives and serves.
    pub(crate) async fn is_well(&self) {
        assert_eq!(self.http.get("/live").await.status, StatusCode::OK);
        self.serves(3).await;
        assert!(!self.process.panicked(), "it panicked");
    }
}

/// A running `dynamo-host mock-engine` of model `m`.
pub(crate) struct MockProcess {
    pub(crate) process: Process,
    pub(crate) http: Client,
}

impl MockProcess {
    /// Starts one on a free port of an address of its own, with `--profile` parameters.
    pub(crate) async fn start(profile: &[&str]) -> Self {
        Self::start_at(&own_address(), profile).await
    }

    pub(crate) async fn start_at(address: &str, profile: &[&str]) -> Self {
        let mut arguments = vec!["mock-engine", "--http", address, "--model", "m"];
        arguments.extend(profile.iter().flat_map(|parameter| ["--profile", parameter]));
        let mut process = Process::start("dynamo-host mock-engine", &mut dynamo_host(&arguments));
        let http = Client::new(&process.listener("mock engine listening on http://").await);
        Self { process, http }
    }

    pub(crate) fn url(&self) -> &str {
        self.http.base()
    }

    /// Waits until so many requests run.
    pub(crate) async fn runs(&self, requests: u32) {
        let what = format!("the engine runs {requests} requests");
        eventually(&what, async || {
            (self.http.metric("vllm:num_requests_running", &[]).await == f64::from(requests)).then_some(())
        })
        .await;
    }
}

/// A completion of `max_tokens` tokens.
pub(crate) fn completion(max_tokens: u32) -> Value {
    json!({ "model": "m", "prompt": "count", "max_tokens": max_tokens })
}

/// A chat of one message, answered in `max_tokens` tokens.
pub(crate) fn chat(max_tokens: u32) -> Value {
    json!({ "model": "m", "messages": [{ "role": "user", "content": "count" }], "max_tokens": max_tokens })
}

/// The same, streamed.
pub(crate) fn streamed(mut body: Value) -> Value {
    body["stream"] = true.into();
    body
}

fn url_encoded(text: &str) -> String {
    text.bytes()
        .map(|byte| if byte.is_ascii_alphanumeric() { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}
