//! The adapter at a real vLLM, on the CPU. One server for all checks: it takes minutes to start.
//!
//! `cargo xtask real-engine --vllm` installs it and runs this alone, without `pair`, which `--disagg` runs.

mod killed;
mod kv;
mod pair;

use std::{
    env,
    ffi::OsStr,
    fs,
    net::SocketAddr,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use dynamo_engine_api::{
    Endpoint, Engine, EngineError, GenerateRequest, Reply,
    conformance::{Capabilities, Fixture, assert_conforms, closed_port},
};
use dynamo_engine_openai::{OpenAiEngine, OpenAiOptions};
use tokio::time::{Instant, sleep};

use crate::{
    engine::{MODEL, completion},
    harness::client::Client,
    tokens,
};

/// How long it may take to start: three processes import all of torch, on two cores.
const STARTS_WITHIN: Duration = Duration::from_secs(400);
const ENDS_WITHIN: Duration = Duration::from_secs(20);
const ADAPTER: &str = "sql";

/// A running vLLM. Its processes end with it.
struct VllmServer {
    child: Child,
    log: PathBuf,
    url: String,
}

impl VllmServer {
    /// With the tokenizer of its model, or another.
    fn start(tokenizer: Option<&Path>) -> Self {
        let flags = tokenizer.into_iter().flat_map(|directory| [OsStr::new("--tokenizer"), directory.as_os_str()]);
        Self::start_at(closed_port().unwrap(), &flags.collect::<Vec<_>>())
    }

    /// The same at an address, with flags of one's own.
    fn start_at(address: SocketAddr, flags: &[impl AsRef<OsStr>]) -> Self {
        Self::start_with(address, flags, &[])
    }

    /// The same with variables of its environment.
    fn start_with(address: SocketAddr, flags: &[impl AsRef<OsStr>], variables: &[(&str, &str)]) -> Self {
        let files = told("DYNAMO_HOST_TEST_VLLM_FILES");
        // Two may run at once.
        let log = files.join(format!("vllm-{}.log", address.port()));
        let output = fs::File::create(&log).unwrap();
        let mut command = Command::new(told("DYNAMO_HOST_TEST_VLLM"));
        command.arg("serve").arg(files.join("model")).args(["--served-model-name", MODEL, "--host", "127.0.0.1"]);
        command.args(["--port", &address.port().to_string(), "--dtype", "bfloat16", "--seed", "0", "--enforce-eager"]);
        command.args(["--max-model-len", "4096", "--max-num-seqs", "32", "--scheduling-policy", "priority"]);
        // The CPU's attention wants blocks of a multiple of 32.
        command.args(["--block-size", "32", "--kv-cache-memory-bytes", "67108864"]);
        command.args(["--enable-lora", "--max-lora-rank", "8", "--lora-modules"]);
        command.arg(format!("{ADAPTER}={}", files.join("lora").display()));
        command.args(flags);
        command.envs([
            ("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
            ("OMP_NUM_THREADS", "1"),
            ("VLLM_HOST_IP", "127.0.0.1"),
            ("GLOO_SOCKET_IFNAME", "lo"),
            ("HF_HUB_OFFLINE", "1"),
            ("VLLM_NO_USAGE_STATS", "1"),
            ("TOKENIZERS_PARALLELISM", "false"),
        ]);
        command.envs(variables.iter().copied());
        // A group of its own, so that its own children can be ended with it.
        command.stdin(Stdio::null()).stdout(output.try_clone().unwrap()).stderr(output).process_group(0);
        let child = command.spawn().unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
        Self { child, log, url: format!("http://{address}") }
    }

    /// Waits until a probe finds it alive; until then, the port is closed.
    async fn alive(&mut self, adapter: &OpenAiEngine) {
        let give_up = Instant::now() + STARTS_WITHIN;
        while let Err(error) = adapter.probe().await {
            assert!(matches!(error, EngineError::Connect { .. } | EngineError::Timeout { .. }), "{error}");
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none(), "vLLM ended with {}; see {}", ended.unwrap(), self.log.display());
            assert!(Instant::now() < give_up, "not alive within {} s; see {}", STARTS_WITHIN.as_secs(), self.log.display());
            sleep(Duration::from_millis(250)).await;
        }
    }

    fn signal(&self, name: &str) {
        let group = format!("-{}", self.child.id());
        let _ = Command::new("kill").args(["-s", name, "--", &group]).stderr(Stdio::null()).status();
    }
}

impl Drop for VllmServer {
    fn drop(&mut self) {
        self.signal("TERM");
        let give_up = std::time::Instant::now() + ENDS_WITHIN;
        while self.child.try_wait().is_ok_and(|ended| ended.is_none()) && std::time::Instant::now() < give_up {
            std::thread::sleep(Duration::from_millis(50));
        }
        self.signal("KILL");
        let _ = self.child.wait();
    }
}

fn told(variable: &str) -> PathBuf {
    env::var_os(variable).unwrap_or_else(|| panic!("{variable} is not set; run: cargo xtask real-engine --vllm")).into()
}

struct Vllm {
    adapter: Arc<OpenAiEngine>,
    http: Client,
}

impl Fixture for Vllm {
    fn engine(&self) -> Arc<dyn Engine> {
        self.adapter.clone()
    }

    fn model(&self) -> &str {
        MODEL
    }

    async fn running(&self) -> Option<u32> {
        let running = self.http.metric("vllm:num_requests_running", &[]).await;
        Some((running + self.http.metric("vllm:num_requests_waiting", &[]).await) as u32)
    }

    fn dead_engine(&self) -> Option<Arc<dyn Engine>> {
        let url = format!("http://{}", closed_port().unwrap());
        Some(Arc::new(OpenAiEngine::new(&url, OpenAiOptions::default()).unwrap()))
    }

    fn capabilities(&self) -> Capabilities {
        let offers = &[Endpoint::Messages, Endpoint::CountTokens, Endpoint::Responses];
        Capabilities { reports_load: true, offers, ..Capabilities::default() }
    }

    fn long_output_tokens(&self) -> u32 {
        4000
    }

    fn patience(&self) -> Duration {
        Duration::from_secs(120)
    }
}

#[tokio::test]
async fn a_real_vllm_is_known_and_conforms() {
    let mut server = VllmServer::start(None);
    let options = OpenAiOptions { forward_priority: true, ..Default::default() };
    let adapter = Arc::new(OpenAiEngine::new(&server.url, options).unwrap());
    server.alive(&adapter).await;
    assert_eq!(adapter.kind(), "vllm");

    let models = adapter.models().await.unwrap();
    let cards: Vec<_> = models.iter().map(|card| (card.id.as_str(), card.max_model_len, card.parent.as_deref())).collect();
    assert_eq!(cards, [(MODEL, Some(4096), None), (ADAPTER, None, Some(MODEL))]);

    let load = adapter.load().await.unwrap().remove(0);
    assert_eq!((load.rank, load.running, load.queued, load.block_size), (0, Some(0), Some(0), Some(32)));
    assert!(load.kv_tokens_total.is_some_and(|tokens| tokens > 0) && load.kv_tokens_free == load.kv_tokens_total, "{load:?}");

    for (priority, rank, model) in [(5, None, MODEL), (-5, Some(0), MODEL), (0, None, ADAPTER)] {
        let mut asked = completion("Once upon", 4);
        asked["model"] = model.into();
        let mut request = GenerateRequest::new(Endpoint::Completions, asked.to_string().into(), false, "real".into());
        (request.priority, request.rank) = (priority, rank);
        let Reply::Whole(reply) = adapter.generate(request).await.unwrap() else { panic!("a stream") };
        assert_eq!(reply.status, 200, "priority {priority}, rank {rank:?}, model {model}: {:?}", reply.body);
    }

    tokens::assert_equal(&told("DYNAMO_HOST_TEST_VLLM_FILES").join("model"), &*adapter).await;
    tokens::assert_equal_counts(&told("DYNAMO_HOST_TEST_VLLM_FILES").join("model"), &Client::new(&server.url)).await;

    let vllm = Vllm { adapter: adapter.clone(), http: Client::new(&server.url) };
    assert_conforms(&vllm).await;

    drop(server);
    let error = adapter.probe().await.unwrap_err();
    // The second, where its end is not heard before the connection that is kept is used.
    assert!(matches!(error, EngineError::Connect { .. } | EngineError::Broken { .. }), "{error}");
}

#[tokio::test]
async fn a_real_vllm_tokenizes_as_we_do_with_other_tokenizers() {
    let small = Path::new(env!("CARGO_MANIFEST_DIR")).join("tokens/tests/fixtures/small");
    let given = env::var_os("DYNAMO_HOST_TEST_TOKENIZER").map(PathBuf::from);
    for directory in [Some(small), given].into_iter().flatten() {
        let mut server = VllmServer::start(Some(&directory));
        let adapter = OpenAiEngine::new(&server.url, OpenAiOptions::default()).unwrap();
        server.alive(&adapter).await;
        tokens::assert_equal(&directory, &adapter).await;
    }
}
