//! The conformance suite, over HTTP to the mock engine.

use std::sync::Arc;

use dynamo_engine_api::{
    Engine,
    conformance::{Fixture, assert_conforms, closed_port},
};
use dynamo_engine_mock::{MockEngine, server};
use dynamo_engine_openai::{OpenAiEngine, OpenAiOptions};
use tokio::{net::TcpListener, task::JoinSet};

struct MockServer {
    mock: Arc<MockEngine>,
    engine: Arc<OpenAiEngine>,
    _server: JoinSet<std::io::Result<()>>,
}

impl MockServer {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let mock = Arc::new(MockEngine::from_url("mock://engine?model=mock-model").unwrap());
        let mut tasks = JoinSet::new();
        tasks.spawn(server::serve(listener, mock.clone(), std::future::pending()));
        let engine = Arc::new(OpenAiEngine::new(&url, OpenAiOptions::default()).unwrap());
        Self { mock, engine, _server: tasks }
    }
}

impl Fixture for MockServer {
    fn engine(&self) -> Arc<dyn Engine> {
        self.engine.clone()
    }

    fn model(&self) -> &str {
        "mock-model"
    }

    async fn running(&self) -> Option<u32> {
        let snapshot = self.mock.snapshot().await.ok()?;
        Some(snapshot.running + snapshot.waiting)
    }

    fn dead_engine(&self) -> Option<Arc<dyn Engine>> {
        let url = format!("http://{}", closed_port().unwrap());
        Some(Arc::new(OpenAiEngine::new(&url, OpenAiOptions::default()).unwrap()))
    }
}

#[tokio::test]
async fn the_adapter_conforms_over_the_mock_engines_server() {
    assert_conforms(&MockServer::start().await).await;
}
