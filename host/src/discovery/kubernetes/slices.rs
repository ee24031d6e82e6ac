//! From EndpointSlices to workers: pure, so that it is tested without a cluster.
//!
//! An endpoint that is ready is a worker. Its URL is its address and the slice's port of the name that the slice asks for,
//! else the one named `http`, else the only one. What else is to be known of it stands in annotations of the slice, or in
//! labels, which a Service passes on to its slices. Tokens and files cannot be named there: whoever may write an annotation
//! must not be able to have the host send them.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
};

use dynamo_engine_openai::UnknownKind;
use dynamo_host_core::Role;
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};

use crate::{
    config::{WorkerConfig, WrittenWorker},
    discovery::{Found, Problem},
    roster,
};

/// How the keys of our labels and annotations begin.
const PREFIX: &str = "dynamo-host/";
/// The port without another wish.
const PORT: &str = "http";
/// Labels of workers that endpoints fill: the contract's topology levels.
const NODE: &str = "host";
const ZONE: &str = "zone";

/// The slices that there are.
#[derive(Default)]
pub(super) struct Slices(BTreeMap<String, Known>);

/// A slice, and how its workers are written.
struct Known {
    slice: EndpointSlice,
    /// As it was last understood.
    wishes: Option<Wishes>,
    trouble: Option<String>,
}

/// What a slice's labels and annotations say of its workers.
#[derive(Clone, Debug, Default, PartialEq)]
struct Wishes {
    port: Option<String>,
    scheme: Option<String>,
    model: Option<String>,
    role: Role,
    handoff: Option<String>,
    bootstrap_port: Option<u16>,
    kind: Option<crate::config::Kind>,
    ranks: Option<u32>,
    block_size: Option<u32>,
    max_running: Option<u32>,
    forward_priority: bool,
    labels: BTreeMap<String, String>,
}

impl Slices {
    /// Takes all of them for those that were there.
    pub(super) fn replace(&mut self, slices: BTreeMap<String, EndpointSlice>) {
        self.0.retain(|name, _| slices.contains_key(name));
        slices.into_iter().for_each(|(name, slice)| self.put(name, slice));
    }

    /// Takes one that is new or has changed. If its wishes are not understood, those before stay.
    pub(super) fn put(&mut self, name: String, slice: EndpointSlice) {
        let known = self.0.remove(&name);
        let (wishes, trouble) = match Wishes::of(&slice) {
            Ok(wishes) => (Some(wishes), None),
            Err(reason) => (known.and_then(|known| known.wishes), Some(reason)),
        };
        self.0.insert(name, Known { slice, wishes, trouble });
    }

    pub(super) fn remove(&mut self, name: &str) {
        self.0.remove(name);
    }

    /// All workers, and what is not understood.
    pub(super) fn found(&self) -> Found {
        let mut found = Found::default();
        // Which slice named it, with which kind of addresses.
        let mut named: HashMap<String, (&str, &str)> = HashMap::new();
        for (name, Known { slice, wishes, trouble }) in &self.0 {
            let mut problem = |reason: String| found.problems.push(Problem { place: format!("slice {name}"), reason });
            trouble.clone().map(&mut problem);
            let Some(wishes) = wishes else { continue };
            let port = match wishes.port_of(slice) {
                Ok(port) => port,
                Err(reason) => {
                    problem(reason);
                    continue;
                }
            };
            for endpoint in slice.endpoints.iter().flatten().filter(|endpoint| is_ready(endpoint)) {
                match wishes.worker(endpoint, port) {
                    // A pod of two address families is in two slices, and one worker.
                    Ok(worker) => match named.get(&worker.name) {
                        Some((_, kind)) if *kind != slice.address_type => {}
                        Some((first, _)) => {
                            problem(format!(
                                "endpoint {:?} is in slice {first} already; let the selector match one",
                                worker.name
                            ));
                        }
                        None => {
                            named.insert(worker.name.clone(), (name, &slice.address_type));
                            found.workers.push(worker);
                        }
                    },
                    Err(reason) => problem(reason),
                }
            }
        }
        found
    }
}

/// Whether requests may go there. Not saying so is ready, by the API's own words.
fn is_ready(endpoint: &Endpoint) -> bool {
    endpoint.conditions.as_ref().and_then(|conditions| conditions.ready).unwrap_or(true)
}

impl Wishes {
    /// Reads a slice's labels, and its annotations, which win.
    fn of(slice: &EndpointSlice) -> Result<Self, String> {
        let mut wishes = Self::default();
        let written = [&slice.metadata.labels, &slice.metadata.annotations];
        for (key, value) in written.into_iter().flatten().flatten() {
            let Some(wish) = key.strip_prefix(PREFIX) else { continue };
            let wrong = |reason: String| format!("{key} is {value:?}; {reason}");
            let number = || value.parse().map_err(|_| wrong("use a whole number".to_owned()));
            match wish {
                "port" => wishes.port = Some(value.clone()),
                "scheme" if matches!(value.as_str(), "http" | "https") => wishes.scheme = Some(value.clone()),
                "scheme" => return Err(wrong("use http or https".to_owned())),
                "model" => wishes.model = Some(value.clone()),
                "role" => wishes.role = value.parse().map_err(wrong)?,
                "handoff" => wishes.handoff = Some(value.clone()),
                "bootstrap-port" => {
                    wishes.bootstrap_port = Some(value.parse().map_err(|_| wrong("use 1 to 65535".to_owned()))?);
                }
                "kind" => wishes.kind = Some(value.parse().map_err(|error: UnknownKind| wrong(error.to_string()))?),
                "ranks" => wishes.ranks = Some(number()?),
                "block-size" => wishes.block_size = Some(number()?),
                "max-running" => wishes.max_running = Some(number()?),
                "forward-priority" => {
                    wishes.forward_priority = value.parse().map_err(|_| wrong("use true or false".to_owned()))?;
                }
                _ => match wish.strip_prefix("label.") {
                    Some(label) if !label.is_empty() => drop(wishes.labels.insert(label.to_owned(), value.clone())),
                    _ => {
                        let known = "port, scheme, model, role, handoff, bootstrap-port, kind, ranks, block-size, max-running, \
                                     forward-priority and label.NAME";
                        return Err(format!("{key} is not known; after {PREFIX} there are {known}"));
                    }
                },
            }
        }
        Ok(wishes)
    }

    /// The port of a slice that workers listen on.
    fn port_of(&self, slice: &EndpointSlice) -> Result<u16, String> {
        let ports = slice.ports.as_deref().unwrap_or_default();
        let named = |name: &str| ports.iter().find(|port| port.name.as_deref() == Some(name));
        let port = match &self.port {
            Some(name) => named(name).ok_or_else(|| format!("it has no port named {name:?}, which {PREFIX}port names"))?,
            None => match (named(PORT), ports) {
                (Some(port), _) | (None, [port]) => port,
                _ => return Err(format!("none of its {} ports is named {PORT:?}; name one with {PREFIX}port", ports.len())),
            },
        };
        port.port.and_then(|port| u16::try_from(port).ok()).ok_or_else(|| "its port has no number".to_owned())
    }

    fn worker(&self, endpoint: &Endpoint, port: u16) -> Result<WorkerConfig, String> {
        let address = endpoint.addresses.first().ok_or("an endpoint has no address")?;
        let host = match address.parse() {
            Ok(IpAddr::V6(address)) => format!("[{address}]"),
            _ => address.clone(),
        };
        let pod = endpoint.target_ref.as_ref().filter(|target| target.kind.as_deref() == Some("Pod"));
        let mut labels = self.labels.clone();
        for (label, value) in [(NODE, &endpoint.node_name), (ZONE, &endpoint.zone)] {
            if let Some(value) = value {
                labels.entry(label.to_owned()).or_insert_with(|| value.clone());
            }
        }
        let worker = WorkerConfig::try_from(WrittenWorker {
            url: format!("{}://{host}:{port}", self.scheme.as_deref().unwrap_or("http")),
            name: pod.and_then(|pod| pod.name.clone()),
            model: self.model.clone(),
            role: self.role,
            handoff: self.handoff.clone(),
            bootstrap_port: self.bootstrap_port,
            kind: self.kind,
            ranks: self.ranks,
            block_size: self.block_size,
            max_running: self.max_running,
            forward_priority: self.forward_priority,
            labels,
            ..WrittenWorker::default()
        })?;
        roster::check(&worker)?;
        Ok(worker)
    }
}

#[cfg(test)]
mod tests {
    use dynamo_engine_api::Protocol;
    use serde_json::{Value, json};

    use super::*;

    /// A slice of the API's own form.
    fn slice(name: &str, annotations: Value, ports: Value, endpoints: Value) -> (String, EndpointSlice) {
        let value = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": { "name": name, "namespace": "prod", "annotations": annotations, "labels": { "app": "vllm" } },
            "ports": ports, "endpoints": endpoints,
        });
        (name.to_owned(), serde_json::from_value(value).unwrap())
    }

    fn pod(name: &str, address: &str) -> Value {
        json!({ "addresses": [address], "targetRef": { "kind": "Pod", "name": name }, "nodeName": "n1", "zone": "z1" })
    }

    fn found(slices: impl IntoIterator<Item = (String, EndpointSlice)>) -> (Vec<String>, Vec<String>) {
        let mut all = Slices::default();
        slices.into_iter().for_each(|(name, slice)| all.put(name, slice));
        told(&all)
    }

    fn told(slices: &Slices) -> (Vec<String>, Vec<String>) {
        let found = slices.found();
        let workers = found.workers.iter().map(|worker| format!("{}={}", worker.name, worker.url)).collect();
        (workers, found.problems.into_iter().map(|problem| format!("{}: {}", problem.place, problem.reason)).collect())
    }

    fn http() -> Value {
        json!([{ "name": "metrics", "port": 9000 }, { "name": "http", "port": 8000 }])
    }

    #[test]
    fn ready_endpoints_are_workers_with_their_topology() {
        let mut away = pod("c", "10.0.0.3");
        away["conditions"] = json!({ "ready": false, "serving": true, "terminating": true });
        let mut bare = json!({ "addresses": ["10.0.0.4"], "conditions": { "ready": true } });
        bare["hostname"] = "x".into();
        let (name, slice) = slice("s", json!({}), http(), json!([pod("a", "10.0.0.1"), away, bare]));
        assert_eq!(found([(name.clone(), slice.clone())]).0, ["a=http://10.0.0.1:8000", "10.0.0.4:8000=http://10.0.0.4:8000"]);
        let mut slices = Slices::default();
        slices.put(name, slice);
        let labels = &slices.found().workers[0].labels;
        assert_eq!((labels["host"].as_str(), labels["zone"].as_str()), ("n1", "z1"));
    }

    #[test]
    fn annotations_say_what_workers_are() {
        let annotations = json!({
            "dynamo-host/port": "metrics", "dynamo-host/model": "Qwen/Qwen3", "dynamo-host/kind": "vllm", "dynamo-host/ranks": "2",
            "dynamo-host/role": "prefill", "dynamo-host/handoff": "bootstrap", "dynamo-host/bootstrap-port": "8999",
            "dynamo-host/scheme": "http", "dynamo-host/label.price": "2.5", "dynamo-host/label.zone": "mine", "other/x": "y",
        });
        let (name, slice) = slice("s", annotations, http(), json!([pod("a", "10.0.0.1")]));
        let wishes = Wishes::of(&slice).unwrap();
        assert_eq!((wishes.model.as_deref(), wishes.ranks), (Some("Qwen/Qwen3"), Some(2)));
        assert_eq!(wishes.kind.unwrap().name(), "vllm");
        let mut slices = Slices::default();
        slices.put(name, slice);
        let found = slices.found();
        let worker = found.workers.first().unwrap_or_else(|| panic!("no worker: {:?}", found.problems));
        assert_eq!((worker.url.as_str(), worker.labels["zone"].as_str()), ("http://10.0.0.1:9000", "mine"));
        assert_eq!((worker.role, worker.handoff, worker.bootstrap_port), (Role::Prefill, Some(Protocol::Bootstrap), Some(8999)));
    }

    #[test]
    fn what_is_not_understood_is_named_and_leaves_the_workers_as_they_were() {
        let mut slices = Slices::default();
        let put = |slices: &mut Slices, annotations| {
            let (name, slice) = slice("s", annotations, http(), json!([pod("a", "10.0.0.1")]));
            slices.put(name, slice);
        };
        put(&mut slices, json!({ "dynamo-host/port": "metrics" }));
        put(&mut slices, json!({ "dynamo-host/kind": "ollama" }));
        let (workers, problems) = told(&slices);
        assert_eq!(workers, ["a=http://10.0.0.1:9000"]);
        assert!(
            problems[0].starts_with("slice s: dynamo-host/kind is \"ollama\"") && problems[0].contains("sglang"),
            "{problems:?}"
        );
        put(&mut slices, json!({}));
        assert_eq!(told(&slices), (vec!["a=http://10.0.0.1:8000".to_owned()], Vec::new()));
        for (annotations, says) in [
            (json!({ "dynamo-host/bearer-file": "/etc/passwd" }), "is not known"),
            (json!({ "dynamo-host/ranks": "many" }), "whole number"),
            (json!({ "dynamo-host/role": "chef" }), "use aggregated"),
            (json!({ "dynamo-host/scheme": "ftp" }), "use http or https"),
            (json!({ "dynamo-host/port": "grpc" }), "no port named \"grpc\""),
            (json!({ "dynamo-host/ranks": "0" }), "use 1 to 1024"),
            (json!({ "dynamo-host/handoff": "nixl" }), "go with role"),
            (json!({ "dynamo-host/role": "prefill", "dynamo-host/handoff": "pigeon" }), "use nixl, mooncake"),
            (json!({ "dynamo-host/role": "prefill", "dynamo-host/bootstrap-port": "x" }), "use 1 to 65535"),
        ] {
            let (workers, problems) = found([slice("s", annotations, http(), json!([pod("a", "10.0.0.1")]))]);
            assert!(workers.is_empty() && problems[0].contains(says), "{problems:?}");
        }
    }

    #[test]
    fn the_only_port_needs_no_name_and_of_several_one_must_be_named() {
        let one = json!([{ "port": 8080 }]);
        assert_eq!(found([slice("s", json!({}), one, json!([pod("a", "10.0.0.1")]))]).0, ["a=http://10.0.0.1:8080"]);
        let two = json!([{ "name": "x", "port": 1 }, { "name": "y", "port": 2 }]);
        let (_, problems) = found([slice("s", json!({}), two, json!([pod("a", "10.0.0.1")]))]);
        assert!(problems[0].contains("dynamo-host/port"), "{problems:?}");
    }

    #[test]
    fn a_pod_of_two_address_families_is_one_worker_and_one_of_two_services_is_told() {
        let v4 = slice("a4", json!({}), http(), json!([pod("a", "10.0.0.1")]));
        let mut v6 = slice("a6", json!({}), http(), json!([pod("a", "fd00::1"), pod("b", "fd00::2")]));
        v6.1.address_type = "IPv6".to_owned();
        let (workers, problems) = found([v4.clone(), v6]);
        assert_eq!(
            (workers, problems),
            (vec!["a=http://10.0.0.1:8000".to_owned(), "b=http://[fd00::2]:8000".to_owned()], vec![])
        );
        let (workers, problems) = found([v4, slice("other", json!({}), http(), json!([pod("a", "10.0.0.1")]))]);
        assert_eq!(workers.len(), 1);
        assert!(problems[0].contains("in slice a4 already"), "{problems:?}");
    }

    #[test]
    fn a_new_list_replaces_what_was_there() {
        let mut slices = Slices::default();
        let one = slice("one", json!({}), http(), json!([pod("a", "10.0.0.1")]));
        let two = slice("two", json!({}), http(), json!([pod("b", "10.0.0.2")]));
        slices.replace(BTreeMap::from([one, two.clone()]));
        assert_eq!(told(&slices).0.len(), 2);
        slices.replace(BTreeMap::from([two]));
        assert_eq!(told(&slices).0, ["b=http://10.0.0.2:8000"]);
        slices.remove("two");
        assert!(told(&slices).0.is_empty());
    }
}
