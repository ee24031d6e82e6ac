//! The suite that every adapter passes: over a real engine, and over a host in front of two.

use std::{sync::Arc, time::Duration};

use dynamo_engine_api::{
    Endpoint, Engine,
    conformance::{Capabilities, Fixture, assert_conforms, closed_port},
};
use dynamo_engine_openai::{OpenAiEngine, OpenAiOptions};

use crate::engine::{LlamaServer, MODEL, host_over};

struct Llama {
    adapter: Arc<OpenAiEngine>,
    engines: Vec<LlamaServer>,
    capabilities: Capabilities,
}

fn adapter(url: &str) -> Arc<OpenAiEngine> {
    Arc::new(OpenAiEngine::new(url, OpenAiOptions::default()).unwrap())
}

impl Fixture for Llama {
    fn engine(&self) -> Arc<dyn Engine> {
        self.adapter.clone()
    }

    fn model(&self) -> &str {
        MODEL
    }

    async fn running(&self) -> Option<u32> {
        let mut running = 0;
        for engine in &self.engines {
            running += engine.running().await;
        }
        Some(running)
    }

    fn dead_engine(&self) -> Option<Arc<dyn Engine>> {
        Some(adapter(&format!("http://{}", closed_port().unwrap())))
    }

    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    /// A second of work, within a slot's 4,096 tokens.
    fn long_output_tokens(&self) -> u32 {
        3900
    }

    /// It takes 2 ms.
    fn cancels_within(&self) -> Duration {
        Duration::from_millis(200)
    }
}

/// It ignores the model's name, and works on for a client that left an unstreamed request.
const LLAMA: Capabilities = Capabilities {
    lists_models: true,
    token_id_prompts: true,
    stream_usage: true,
    unknown_fields: true,
    refuses_unknown_model: false,
    deterministic: true,
    cancels_whole: false,
    error_objects: true,
    reports_load: true,
    offers: &[Endpoint::Messages, Endpoint::CountTokens, Endpoint::Responses],
};

#[tokio::test]
async fn the_adapter_conforms_over_a_real_engine() {
    let engine = LlamaServer::start().await;
    let llama = Llama { adapter: adapter(engine.http.base()), engines: vec![engine], capabilities: LLAMA };
    assert_conforms(&llama).await;
    assert_eq!(llama.adapter.kind(), "llamacpp");
}

#[tokio::test]
async fn a_host_over_two_real_engines_conforms_as_if_it_were_one() {
    let engines = vec![LlamaServer::start().await, LlamaServer::start().await];
    let host = host_over(&engines).await;
    // The host knows its models, whatever its engines do. What it tells of load and offers beyond chats is its own.
    let capabilities = Capabilities { refuses_unknown_model: true, reports_load: false, offers: &[], ..LLAMA };
    assert_conforms(&Llama { adapter: adapter(host.http.base()), engines, capabilities }).await;
}
