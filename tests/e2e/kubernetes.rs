//! Workers from Kubernetes, with an API server that speaks as much as the watch needs: lists, and streams of changes.

use std::{fs, sync::Arc};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
};

use crate::{
    harness::{
        client::Client,
        eventually,
        host::{Host, MockProcess},
        process::{Process, dynamo_host},
    },
    workers::{workers, workers_until},
};

/// What the API server holds.
#[derive(Clone, Default)]
struct Cluster {
    slices: Vec<Value>,
    /// Changes, the first of which has version 1.
    changes: Vec<Value>,
    is_down: bool,
}

/// The API server. It ends when it is dropped.
struct ApiServer {
    url: String,
    cluster: Arc<watch::Sender<Cluster>>,
    requests: Arc<watch::Sender<Vec<String>>>,
    _tasks: JoinSet<()>,
}

impl ApiServer {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (cluster, requests) = (Arc::new(watch::Sender::new(Cluster::default())), Arc::new(watch::Sender::new(Vec::new())));
        let mut tasks = JoinSet::new();
        let (shared, seen) = (Arc::clone(&cluster), Arc::clone(&requests));
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                connections.spawn(serve(stream, Arc::clone(&shared), Arc::clone(&seen)));
            }
        });
        Self { url, cluster, requests, _tasks: tasks }
    }

    /// Makes or changes a slice: `(pod, URL, ready)` of each endpoint, all of one port.
    fn put(&self, name: &str, annotations: Value, endpoints: &[(&str, &str, bool)]) {
        let port = endpoints.first().map_or(1, |(_, url, _)| url.rsplit(':').next().unwrap().parse::<u16>().unwrap());
        let endpoints: Vec<Value> = endpoints
            .iter()
            .map(|(pod, url, ready)| {
                let address = url.strip_prefix("http://").unwrap().split(':').next().unwrap();
                json!({
                    "addresses": [address], "conditions": { "ready": ready }, "nodeName": "n1",
                    "targetRef": { "kind": "Pod", "name": pod },
                })
            })
            .collect();
        self.cluster.send_modify(|cluster| {
            let version = (cluster.changes.len() + 1).to_string();
            let slice = json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
                "metadata": { "name": name, "namespace": "prod", "resourceVersion": version, "annotations": annotations },
                "ports": [{ "name": "http", "port": port }], "endpoints": endpoints,
            });
            let kind = if cluster.take(name) { "MODIFIED" } else { "ADDED" };
            cluster.slices.push(slice.clone());
            cluster.changes.push(json!({ "type": kind, "object": slice }));
        });
    }

    fn delete(&self, name: &str) {
        self.cluster.send_modify(|cluster| {
            let version = (cluster.changes.len() + 1).to_string();
            let gone = json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4", "endpoints": [],
                "metadata": { "name": name, "namespace": "prod", "resourceVersion": version },
            });
            assert!(cluster.take(name));
            cluster.changes.push(json!({ "type": "DELETED", "object": gone }));
        });
    }

    fn is_down(&self, is_down: bool) {
        self.cluster.send_modify(|cluster| cluster.is_down = is_down);
    }
}

impl Cluster {
    /// Removes a slice; returns whether it was there.
    fn take(&mut self, name: &str) -> bool {
        let known = self.slices.len();
        self.slices.retain(|slice| slice["metadata"]["name"] != name);
        self.slices.len() < known
    }
}

/// Answers one request: a list, or changes for as long as the client listens.
async fn serve(mut stream: TcpStream, cluster: Arc<watch::Sender<Cluster>>, requests: Arc<watch::Sender<Vec<String>>>) {
    let mut bytes = Vec::new();
    while !bytes.windows(4).any(|window| window == b"\r\n\r\n") {
        if stream.read_buf(&mut bytes).await.unwrap_or(0) == 0 {
            return;
        }
    }
    let head = String::from_utf8_lossy(&bytes).into_owned();
    let path = head.split_whitespace().nth(1).unwrap_or_default().to_owned();
    requests.send_modify(|requests| requests.push(path.clone()));
    let mut state = cluster.subscribe();
    let now = state.borrow_and_update().clone();
    let whole = |status: &str, body: &Value| {
        let body = body.to_string();
        let length = body.len();
        format!(
            "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
        )
    };
    if now.is_down {
        let status = json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure", "message": "etcd is away", "code": 500 });
        let _ = stream.write_all(whole("500 Internal Server Error", &status).as_bytes()).await;
        return;
    }
    if !path.contains("watch=true") {
        let list = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSliceList",
            "metadata": { "resourceVersion": now.changes.len().to_string() }, "items": now.slices,
        });
        let _ = stream.write_all(whole("200 OK", &list).as_bytes()).await;
        return;
    }
    let since = path.split(['?', '&']).find_map(|part| part.strip_prefix("resourceVersion=")).unwrap_or("0");
    let mut told: usize = since.parse().unwrap();
    let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
    if stream.write_all(head.as_bytes()).await.is_err() {
        return;
    }
    loop {
        let now = state.borrow_and_update().clone();
        if now.is_down {
            return;
        }
        for change in &now.changes[told..] {
            let line = format!("{change}\n");
            if stream.write_all(format!("{:x}\r\n{line}\r\n", line.len()).as_bytes()).await.is_err() {
                return;
            }
        }
        told = now.changes.len();
        if state.changed().await.is_err() {
            return;
        }
    }
}

async fn host_over(api: &ApiServer) -> (Host, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("kubeconfig");
    let config = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{{ name: c, context: {{ cluster: c, user: u }} }}]\n\
         clusters: [{{ name: c, cluster: {{ server: \"{}\" }} }}]\nusers: [{{ name: u, user: {{}} }}]\n",
        api.url
    );
    fs::write(&file, config).unwrap();
    let arguments = ["serve", "--http", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--discovery", "kubernetes:prod/app=vllm"];
    let mut command = dynamo_host(&arguments);
    command.env("KUBECONFIG", &file);
    let mut process = Process::start("dynamo-host serve", &mut command);
    let http = Client::new(&process.listener("front door listening on http://").await);
    let admin = Client::new(&process.listener("admin listening on http://").await);
    (Host { process, http, admin }, directory)
}

fn states(rows: &[Value]) -> Vec<(&str, &str)> {
    let mut states: Vec<_> = rows.iter().map(|row| (row["name"].as_str().unwrap(), row["state"].as_str().unwrap())).collect();
    states.sort_unstable();
    states
}

#[tokio::test]
async fn workers_come_and_go_with_ready_endpoints() {
    let (one, other) = (MockProcess::start(&["speedup=50"]).await, MockProcess::start(&["speedup=50"]).await);
    let api = ApiServer::start().await;
    api.put("s1", json!({ "dynamo-host/label.zone": "z" }), &[("pod-a", one.url(), true)]);
    let (host, _kubeconfig) = host_over(&api).await;
    let rows = workers_until(&host, "the first is healthy", |rows| states(rows) == [("pod-a", "healthy")]).await;
    assert_eq!((&rows[0]["url"], &rows[0]["source"]), (&json!(one.url()), &json!("kubernetes:prod/app=vllm")));
    let asked = api.requests.borrow().clone();
    let path = "/apis/discovery.k8s.io/v1/namespaces/prod/endpointslices";
    assert!(asked.iter().all(|it| it.starts_with(path) && it.contains("labelSelector=app%3Dvllm")), "{asked:?}");
    host.serves(3).await;

    api.put("s2", json!({}), &[("pod-b", other.url(), true)]);
    workers_until(&host, "both are healthy", |rows| states(rows) == [("pod-a", "healthy"), ("pod-b", "healthy")]).await;
    api.put("s1", json!({}), &[("pod-a", one.url(), false)]);
    workers_until(&host, "the first is gone", |rows| states(rows) == [("pod-b", "healthy")]).await;
    host.serves(3).await;
    api.put("s2", json!({ "dynamo-host/kind": "ollama" }), &[("pod-b", other.url(), true)]);
    eventually("what is not understood is shown", async || {
        let problems = host.admin.get_json("/v1/workers").await["problems"].clone();
        problems.to_string().contains("ollama").then_some(())
    })
    .await;
    assert_eq!(states(&workers(&host).await), [("pod-b", "healthy")]);
    api.delete("s2");
    workers_until(&host, "all are gone", <[Value]>::is_empty).await;
}

#[tokio::test]
async fn workers_stay_while_the_api_server_is_away_and_are_right_again_after() {
    let engine = MockProcess::start(&["speedup=50"]).await;
    let api = ApiServer::start().await;
    api.put("s1", json!({}), &[("pod-a", engine.url(), true)]);
    let (host, _kubeconfig) = host_over(&api).await;
    workers_until(&host, "it is healthy", |rows| states(rows) == [("pod-a", "healthy")]).await;
    api.is_down(true);
    eventually("the trouble is shown", async || {
        let problems = host.admin.get_json("/v1/workers").await["problems"].clone();
        problems.to_string().contains("API server").then_some(())
    })
    .await;
    host.serves(3).await;
    api.put("s2", json!({}), &[("pod-b", engine.url(), true)]);
    api.delete("s1");
    api.is_down(false);
    workers_until(&host, "the other is there", |rows| states(rows) == [("pod-b", "healthy")]).await;
    let problems = host.admin.get_json("/v1/workers").await["problems"].clone();
    assert_eq!(problems, json!([]));
    host.serves(3).await;
}
