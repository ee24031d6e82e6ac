//! Two engines of a pair, under names and addresses that they keep.

use std::net::SocketAddr;

use dynamo_engine_api::conformance::closed_port;
use dynamo_engine_openai::{OpenAiEngine, OpenAiOptions};

use crate::{engine::MODEL, harness::client::Client, vllm::VllmServer};

pub(super) const PREFILL: &str = "prefill";
pub(super) const DECODE: &str = "decode";

/// One engine, running or not.
pub(super) struct Engine {
    name: &'static str,
    address: SocketAddr,
    /// Where engines ask it for what they need to know before they fetch from it.
    side_channel: u16,
    server: Option<VllmServer>,
    pub(super) http: Client,
}

impl Engine {
    /// Starts one; it is not alive yet.
    pub(super) fn new(name: &'static str) -> Self {
        let address = closed_port().unwrap();
        let (side_channel, http) = (closed_port().unwrap().port(), Client::new(&format!("http://{address}")));
        let mut engine = Self { name, address, side_channel, server: None, http };
        engine.start(true);
        engine
    }

    /// Starts it (anew), with its connector or without.
    pub(super) fn start(&mut self, has_connector: bool) {
        // What is left of the one before goes first: it has the port.
        self.server = None;
        // See `killed.rs` for why; and what a prompt had cached is to be told from what came over.
        let mut flags = vec!["--dtype", "float32", "--enable-prefix-caching", "--enable-prompt-tokens-details"];
        let role = if self.name == PREFILL { "kv_producer" } else { "kv_consumer" };
        let connector = format!(r#"{{"kv_connector":"NixlConnector","kv_role":"{role}"}}"#);
        if has_connector {
            flags.extend(["--kv-transfer-config", &connector]);
        }
        let side_channel = self.side_channel.to_string();
        let variables = [
            ("VLLM_NIXL_SIDE_CHANNEL_HOST", "127.0.0.1"),
            ("VLLM_NIXL_SIDE_CHANNEL_PORT", &side_channel),
            ("UCX_NET_DEVICES", "lo"),
            ("UCX_TLS", "tcp,sm,self"),
        ];
        self.server = Some(VllmServer::start_with(self.address, &flags, &variables));
    }

    pub(super) async fn alive(&mut self) {
        let server = self.server.as_mut().unwrap();
        let adapter = OpenAiEngine::new(&server.url, OpenAiOptions::default()).unwrap();
        server.alive(&adapter).await;
    }

    pub(super) fn signal(&self, name: &str) {
        self.server.as_ref().unwrap().signal(name);
    }

    /// Itself for the host's command line.
    pub(super) fn worker(&self) -> String {
        format!("http://{},name={},model={MODEL},role={}", self.address, self.name, self.name)
    }
}
