//! The conformance suite over each kind's double, and over the mock engine's server; and the table of it in the manual.

use std::{env, fmt::Write as _, fs, path::Path, sync::Arc};

use dynamo_engine_api::{
    Endpoint, Engine, Protocol,
    conformance::{Capabilities, Fixture, Report, Verdict, assert_conforms, closed_port, run},
};
use dynamo_engine_mock::{MockEngine, server};
use dynamo_engine_openai::{OpenAiEngine, OpenAiOptions};
use tokio::{net::TcpListener, task::JoinSet};

use crate::{
    doubles::{Double, Llamacpp, MODEL, Manners, Sglang, Transformers, Trtllm, Vllm},
    pairs::{self, Pair},
};

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

fn dead_engine() -> Option<Arc<dyn Engine>> {
    let url = format!("http://{}", closed_port().unwrap());
    Some(Arc::new(OpenAiEngine::new(&url, OpenAiOptions::default()).unwrap()))
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
        dead_engine()
    }
}

#[tokio::test]
async fn the_adapter_conforms_over_the_mock_engines_server() {
    assert_conforms(&MockServer::start().await).await;
}

struct Kind {
    double: Double,
    engine: Arc<OpenAiEngine>,
    can: Capabilities,
    pair: Option<Pair>,
}

impl Kind {
    async fn start(manners: impl Manners, can: Capabilities) -> Self {
        let double = Double::start(manners).await;
        let engine = Arc::new(double.server.engine());
        Self { double, engine, can, pair: None }
    }

    async fn with(mut self, pair: impl Future<Output = Pair>) -> Self {
        self.pair = Some(pair.await);
        self
    }
}

impl Fixture for Kind {
    fn engine(&self) -> Arc<dyn Engine> {
        self.engine.clone()
    }

    fn model(&self) -> &str {
        MODEL
    }

    async fn running(&self) -> Option<u32> {
        Some(self.double.at_work.running())
    }

    fn dead_engine(&self) -> Option<Arc<dyn Engine>> {
        dead_engine()
    }

    fn pair(&self) -> Option<(Arc<dyn Engine>, Arc<dyn Engine>)> {
        let pair = self.pair.as_ref()?;
        Some((pair.prefill.clone(), pair.decode.clone()))
    }

    fn capabilities(&self) -> Capabilities {
        self.can
    }
}

const ANTHROPICS_AND_RESPONSES: &[Endpoint] = &[Endpoint::Messages, Endpoint::CountTokens, Endpoint::Responses];

async fn vllm() -> Kind {
    let can = Capabilities { reports_load: true, offers: ANTHROPICS_AND_RESPONSES, ..Capabilities::default() };
    Kind::start(Vllm::default(), can).await.with(pairs::vllm(Protocol::Nixl)).await
}

async fn sglang() -> Kind {
    let can = Capabilities {
        refuses_unknown_model: false,
        error_objects: false,
        reports_load: true,
        offers: &[Endpoint::Messages, Endpoint::Responses],
        ..Capabilities::default()
    };
    Kind::start(Sglang::default(), can).await.with(pairs::sglang()).await
}

async fn trtllm() -> Kind {
    let can = Capabilities {
        unknown_fields: false,
        refuses_unknown_model: false,
        error_objects: false,
        reports_load: true,
        offers: &[Endpoint::Responses],
        ..Capabilities::default()
    };
    Kind::start(Trtllm::default(), can).await.with(pairs::trtllm()).await
}

async fn llamacpp() -> Kind {
    let can = Capabilities {
        refuses_unknown_model: false,
        cancels_whole: false,
        reports_load: true,
        offers: ANTHROPICS_AND_RESPONSES,
        ..Capabilities::default()
    };
    Kind::start(Llamacpp::default(), can).await
}

async fn transformers() -> Kind {
    let can = Capabilities {
        lists_models: false,
        token_id_prompts: false,
        refuses_unknown_model: false,
        error_objects: false,
        ..Capabilities::default()
    };
    Kind::start(Transformers::default(), can).await
}

/// The table, with a check a row and a kind a column; why something does not concern a kind is below it.
fn table(reports: &[Report]) -> String {
    let mut reasons: Vec<&str> = Vec::new();
    let kinds: Vec<_> = reports.iter().map(|report| format!(" `{}` |", report.adapter)).collect();
    let mut table = format!("| |{}\n|---|{}\n", kinds.concat(), "---|".repeat(kinds.len()));
    for (row, outcome) in reports[0].outcomes.iter().enumerate() {
        write!(table, "| {} |", outcome.check).unwrap();
        for report in reports {
            match &report.outcomes[row].verdict {
                Verdict::Passed => table.push_str(" yes |"),
                Verdict::Failed(seen) => panic!("{}: {}: {seen}", report.adapter, outcome.check),
                Verdict::NotApplicable(why) => {
                    let number = reasons.iter().position(|reason| reason == why).unwrap_or_else(|| {
                        reasons.push(why);
                        reasons.len() - 1
                    });
                    write!(table, " – ({}) |", number + 1).unwrap();
                }
            }
        }
        table.push('\n');
    }
    table.push('\n');
    for (number, reason) in reasons.iter().enumerate() {
        writeln!(table, "{}. {reason}", number + 1).unwrap();
    }
    table
}

/// Each kind conforms and is found to be what it is; the manual's table says so. `UPDATE_DOCS=1` writes it.
#[tokio::test]
async fn the_manuals_conformance_table_is_what_the_suite_reports() {
    const BEGIN: &str = "<!-- conformance: begin -->\n";
    const END: &str = "<!-- conformance: end -->";
    let reports = [
        run(&vllm().await).await,
        run(&sglang().await).await,
        run(&trtllm().await).await,
        run(&llamacpp().await).await,
        run(&transformers().await).await,
    ];
    let found: Vec<_> = reports.iter().map(|report| report.adapter).collect();
    assert_eq!(found, dynamo_engine_openai::Kind::ALL.map(dynamo_engine_openai::Kind::name));

    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/engines.md");
    let manual = fs::read_to_string(&path).unwrap();
    let (before, rest) = manual.split_once(BEGIN).expect("the manual has a place for the table");
    let (written, after) = rest.split_once(END).expect("the table has an end");
    let table = table(&reports);
    if env::var_os("UPDATE_DOCS").is_some() {
        fs::write(&path, format!("{before}{BEGIN}{table}{END}{after}")).unwrap();
    } else {
        assert_eq!(written, table, "docs/engines.md is out of date: run this test with UPDATE_DOCS=1");
    }
}
