//! The suite that every engine adapter passes, against the mock engine in this process.

use std::sync::Arc;

use dynamo_engine_api::{
    Engine,
    conformance::{Fixture, assert_conforms},
};
use dynamo_engine_mock::MockEngine;

struct InProcess(Arc<MockEngine>);

impl Fixture for InProcess {
    fn engine(&self) -> Arc<dyn Engine> {
        Arc::clone(&self.0) as Arc<dyn Engine>
    }

    fn model(&self) -> &str {
        &self.0.options().model
    }

    async fn running(&self) -> Option<u32> {
        let snapshot = self.0.snapshot().await.ok()?;
        Some(snapshot.running + snapshot.waiting)
    }
}

#[tokio::test]
async fn the_mock_engine_conforms() {
    // Slow enough that the suite's long requests are still running when they are dropped.
    let engine = MockEngine::from_url("mock://conformance?model=m&speedup=2").unwrap();
    assert_conforms(&InProcess(Arc::new(engine))).await;
}
