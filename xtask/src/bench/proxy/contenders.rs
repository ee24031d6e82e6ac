//! Who is compared, in which version, started how.
//!
//! All run with their defaults, two things aside: logs at level warn, since that is how a busy proxy is run, and a line per
//! request (smg's default has two) would count against its writer; and a free port for metrics. All listen on 127.0.0.1.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use super::super::processes::free_port;
use crate::{paths, run, system};

/// One of those who are compared.
#[derive(Clone)]
pub(super) struct Contender {
    pub(super) name: &'static str,
    kind: Kind,
}

#[derive(Clone, Copy)]
enum Kind {
    /// No proxy.
    Direct,
    /// Ours, with a policy of `policies/`, or `native`.
    DynamoHost(&'static str),
    /// vLLM's router, with one of its policies.
    VllmRouter(&'static str),
    /// The SGLang model gateway, with one of its policies.
    Smg(&'static str),
}

const ALL: &[Contender] = &[
    Contender { name: "direct", kind: Kind::Direct },
    Contender { name: "dynamo-host-round-robin", kind: Kind::DynamoHost("round-robin") },
    Contender { name: "dynamo-host-least-loaded", kind: Kind::DynamoHost("least-loaded") },
    Contender { name: "dynamo-host-native", kind: Kind::DynamoHost("native") },
    Contender { name: "vllm-router-round-robin", kind: Kind::VllmRouter("round_robin") },
    Contender { name: "vllm-router-cache-aware", kind: Kind::VllmRouter("cache_aware") },
    Contender { name: "smg-round-robin", kind: Kind::Smg("round_robin") },
    Contender { name: "smg-cache-aware", kind: Kind::Smg("cache_aware") },
];

/// Peers from PyPI. A new release is a change to be made here.
const VLLM_ROUTER: &str = "vllm-router==0.1.17";
const SMG: &str = "smg==1.13.0";

/// Names that `--only` takes.
pub(super) fn names() -> Vec<&'static str> {
    ALL.iter().filter(|contender| !contender.is_direct()).map(|contender| contender.name).collect()
}

/// Those chosen, all if none is, with what they need installed; and why others cannot run.
pub(super) fn prepare(only: &[String]) -> Result<(Vec<Contender>, BTreeMap<&'static str, String>)> {
    let chosen =
        |contender: &&Contender| contender.is_direct() || only.is_empty() || only.iter().any(|name| name == contender.name);
    let mut installed: BTreeMap<&str, Result<(), String>> = BTreeMap::new();
    let (mut contenders, mut skipped) = (Vec::new(), BTreeMap::new());
    for contender in ALL.iter().filter(chosen) {
        let outcome = match contender.package() {
            None => Ok(()),
            Some(package) => {
                installed.entry(package).or_insert_with(|| install(package).map_err(|error| format!("{error:#}"))).clone()
            }
        };
        match outcome {
            Ok(()) => contenders.push(contender.clone()),
            Err(reason) => {
                println!("{} is left out: {reason}", contender.name);
                skipped.insert(contender.name, reason);
            }
        }
    }
    Ok((contenders, skipped))
}

impl Contender {
    pub(super) fn is_direct(&self) -> bool {
        matches!(self.kind, Kind::Direct)
    }

    /// What it is, with its version.
    pub(super) fn version(&self) -> String {
        match self.kind {
            Kind::Direct => "no proxy".to_owned(),
            Kind::DynamoHost(_) => concat!("dynamo-host ", env!("CARGO_PKG_VERSION")).to_owned(),
            Kind::VllmRouter(_) | Kind::Smg(_) => self.package().unwrap_or_default().replace("==", " "),
        }
    }

    fn package(&self) -> Option<&'static str> {
        match self.kind {
            Kind::Direct | Kind::DynamoHost(_) => None,
            Kind::VllmRouter(_) => Some(VLLM_ROUTER),
            Kind::Smg(_) => Some(SMG),
        }
    }

    /// How it is started in front of engines; `None` if there is nothing to start.
    pub(super) fn command(&self, port: u16, engines: &[String]) -> Result<Option<Command>> {
        let (port, metrics) = (port.to_string(), free_port()?.to_string());
        let command = match self.kind {
            Kind::Direct => return Ok(None),
            Kind::DynamoHost(policy) => {
                let mut command = Command::new(paths::target().join("release/dynamo-host"));
                command.args(["serve", "--http", &format!("127.0.0.1:{port}"), "--admin", "127.0.0.1:0", "--log-level", "warn"]);
                for engine in engines {
                    command.args(["--worker", engine]);
                }
                let component = paths::policies().join(format!("{policy}.wasm"));
                command.arg("--routing").arg(if policy == "native" { Path::new(policy) } else { &component });
                command
            }
            Kind::VllmRouter(policy) => {
                let mut command = Command::new(environment().join("bin/vllm-router"));
                command.args(["--host", "127.0.0.1", "--port", &port, "--policy", policy, "--log-level", "warning"]);
                command.args(["--prometheus-port", &metrics, "--worker-urls"]).args(engines);
                command
            }
            Kind::Smg(policy) => {
                let mut command = Command::new(environment().join("bin/smg"));
                command.args(["launch", "--host", "127.0.0.1", "--port", &port, "--policy", policy, "--log-level", "warn"]);
                command.args(["--prometheus-port", &metrics, "--worker-urls"]).args(engines);
                command
            }
        };
        Ok(Some(command))
    }
}

/// The peers' Python environment.
fn environment() -> PathBuf {
    paths::target().join("bench/python")
}

/// Installs a peer, unless it is there in this version.
fn install(package: &str) -> Result<()> {
    let python = environment().join("bin/python");
    let (name, version) = package.split_once("==").context("a peer is pinned")?;
    let installed = format!("import importlib.metadata as m; assert m.version({name:?}) == {version:?}");
    if run::works(Command::new(&python).args(["-c", &installed])) {
        return Ok(());
    }
    println!("Installing {package} into {}", environment().display());
    if !run::works(Command::new(&python).args(["-m", "pip", "--version"])) {
        if !run::works(Command::new("python3").args(["-c", "import venv, ensurepip"])) {
            system::install(&["python3", "python3-venv"], "the peers of bench proxy")?;
        }
        run::read(Command::new("python3").args(["-m", "venv", "--clear"]).arg(environment()))?;
    }
    run::read(Command::new(&python).args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", package])).map(drop)
}
