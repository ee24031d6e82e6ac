//! Loading: bytes → inspected → compiled → linked → configured → probed → warm. All off the request path.

use std::{
    fs::File,
    io::{self, Read as _},
    path::Path,
    sync::Arc,
};

use wasmtime::component::Component;

use crate::{
    abi,
    blueprint::{Blueprint, SetupError},
    fault::PolicyFault,
    inspect::inspect,
    runtime::PolicyRuntime,
    state::SlotState,
    trial::ProbeFailure,
    version::PolicyVersion,
    world::World,
};

/// Why bytes cannot be activated as a policy. Each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// No file, or none that can be read.
    #[error("it cannot be read: {reason}")]
    Unreadable {
        /// What the system said.
        reason: String,
    },
    /// No bytes.
    #[error("the file is empty; build the policy again (cargo xtask policies, or cargo build for wasm32-unknown-unknown)")]
    Empty,
    /// Over the bound.
    #[error("the component has {bytes} bytes, more than the {max_bytes} that a policy may have; strip it and build it for size")]
    TooLarge {
        /// Its size.
        bytes: usize,
        /// The bound.
        max_bytes: usize,
    },
    /// Something else.
    #[error("this is not WebAssembly; name a component (.wasm) that cargo xtask policies or wasm-tools component new made")]
    NotWasm,
    /// Not a component.
    #[error(
        "this is a core WebAssembly module, and a policy is a component; wrap it with cargo xtask policies, \
         or wasm-tools component new IN.wasm -o OUT.wasm"
    )]
    CoreModule,
    /// Cut off, or not valid.
    #[error("the component is damaged or not valid: {reason}; build or copy it again")]
    Malformed {
        /// What the parser or validator said.
        reason: String,
    },
    /// No name and version.
    #[error(
        "the custom section `dynamo:policy` {reason}; it holds the lines `name: …` and `version: …`, \
         and the SDK's register! writes it"
    )]
    Description {
        /// What is wrong with it.
        reason: String,
    },
    /// Of no world, or of one that this host does not run.
    #[error(
        "policy {policy:?} does not export what a policy of the world {} does (it exports: {found}); \
         implement one of the SDK's traits and register it",
        worlds()
    )]
    NoWorld {
        /// The policy.
        policy: String,
        /// What it exports instead.
        found: String,
    },
    /// For another slot.
    #[error(
        "policy {policy:?} is of the world `{found}`, and slot {slot} takes the world `{expected}`; \
         activate it in its own slot: dynamo-host policy activate {} FILE", found.slot.as_str()
    )]
    WrongWorld {
        /// The policy.
        policy: String,
        /// Its world.
        found: &'static World,
        /// The slot that it was meant for.
        slot: Arc<str>,
        /// The slot's world.
        expected: &'static World,
    },
    /// Half a policy.
    #[error("policy {policy:?} does not export {export}; build it against the world `{world}` of dynamo:policy@{}", abi::VERSION)]
    MissingExport {
        /// The policy.
        policy: String,
        /// Its world.
        world: &'static World,
        /// What is missing.
        export: String,
    },
    /// Another contract.
    #[error(
        "policy {policy:?} was built for dynamo:policy@{found}, and this host speaks {}; rebuild it with the SDK of this release",
        abi::VERSION
    )]
    ContractVersion {
        /// The policy.
        policy: String,
        /// The version that it was built for.
        found: String,
    },
    /// Reaches for what is outside of the sandbox.
    #[error(
        "policy {policy:?} imports {import}, which a policy of the world `{world}` may not; allowed: dynamo:policy/{{{}}}@{}. \
         Rebuild it for wasm32-unknown-unknown, without WASI",
        world.imports.join(","),
        abi::VERSION
    )]
    ForbiddenImport {
        /// The policy.
        policy: String,
        /// Its world.
        world: &'static World,
        /// What it imports.
        import: String,
    },
    /// Not valid, or not compilable.
    #[error("policy {policy:?} cannot be compiled: {reason}")]
    Compile {
        /// The policy.
        policy: String,
        /// What the compiler said.
        reason: String,
    },
    /// A function of another type or of a later contract.
    #[error(
        "policy {policy:?} does not fit this host's dynamo:policy@{}: {reason}; rebuild it with the SDK of this release",
        abi::VERSION
    )]
    Link {
        /// The policy.
        policy: String,
        /// What does not fit.
        reason: String,
    },
    /// Settings that are not JSON.
    #[error("the settings of policy {policy:?} are not a JSON object: {reason}; write for example {{\"key\": 1}}")]
    SettingsSyntax {
        /// The policy.
        policy: String,
        /// What the parser said.
        reason: String,
    },
    /// Settings that the policy refuses.
    #[error("policy {policy:?} refuses its settings: {reason}; it accepts {accepted}")]
    Settings {
        /// The policy.
        policy: String,
        /// The policy's words.
        reason: String,
        /// Names and types of its settings, from its schema.
        accepted: String,
    },
    /// It fails before it is asked anything.
    #[error("policy {policy:?} cannot be started: {fault}")]
    Start {
        /// The policy.
        policy: String,
        /// What happened.
        fault: PolicyFault,
    },
    /// It fails on made-up requests.
    #[error("policy {policy:?} failed its probe, a made-up request with {rows} {}: {fault}", world.rows)]
    Probe {
        /// The policy.
        policy: String,
        /// Its world.
        world: &'static World,
        /// Size of the probe.
        rows: u32,
        /// What happened.
        fault: PolicyFault,
    },
}

impl LoadError {
    /// Metric label and `code` of the error.
    #[must_use]
    pub fn cause(&self) -> &'static str {
        match self {
            Self::Unreadable { .. } => "unreadable",
            Self::Empty => "empty",
            Self::TooLarge { .. } => "too-large",
            Self::NotWasm => "not-wasm",
            Self::CoreModule => "core-module",
            Self::Malformed { .. } => "malformed",
            Self::Description { .. } => "description",
            Self::NoWorld { .. } | Self::WrongWorld { .. } => "wrong-world",
            Self::MissingExport { .. } => "missing-export",
            Self::ContractVersion { .. } => "contract-version",
            Self::ForbiddenImport { .. } => "forbidden-import",
            Self::Compile { .. } => "compile",
            Self::Link { .. } => "link",
            Self::SettingsSyntax { .. } => "settings-syntax",
            Self::Settings { .. } => "settings",
            Self::Start { .. } => "start",
            Self::Probe { .. } => "probe",
        }
    }
}

/// Reads a component's file, and no more of it into memory than `max_bytes`.
///
/// # Errors
/// If it cannot be read, or is larger than that.
pub fn read_component(path: &Path, max_bytes: usize) -> Result<Vec<u8>, LoadError> {
    let unreadable = |error: io::Error| LoadError::Unreadable { reason: error.to_string() };
    let file = File::open(path).map_err(unreadable)?;
    let size = usize::try_from(file.metadata().map_err(unreadable)?.len()).unwrap_or(usize::MAX);
    if size > max_bytes {
        return Err(LoadError::TooLarge { bytes: size, max_bytes });
    }
    // A device has no size, and a file may grow.
    let mut bytes = Vec::with_capacity(size);
    file.take(max_bytes as u64 + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() > max_bytes {
        return Err(LoadError::TooLarge { bytes: bytes.len(), max_bytes });
    }
    Ok(bytes)
}

/// The worlds that this host runs, for people.
fn worlds() -> String {
    World::ALL.map(|world| format!("`{world}`")).join(" or ")
}

impl PolicyRuntime {
    /// Makes a policy version that is ready to decide. `settings` is a JSON object.
    ///
    /// Blocks for as long as compiling takes: call it off the request path.
    ///
    /// # Errors
    /// Says why these bytes with these settings cannot decide, and what to do about it.
    pub fn load(&self, bytes: &[u8], settings: &str, state: Arc<SlotState>) -> Result<Arc<PolicyVersion>, LoadError> {
        let loaded = self.load_uncounted(bytes, settings, state);
        if let Err(error) = &loaded {
            metrics::counter!("dynamo_host_policy_load_failures_total", "cause" => error.cause()).increment(1);
        }
        loaded
    }

    fn load_uncounted(&self, bytes: &[u8], settings: &str, state: Arc<SlotState>) -> Result<Arc<PolicyVersion>, LoadError> {
        let inspection = inspect(bytes, self.limits().component_bytes)?;
        let world = inspection.world;
        if let Some(expected) = state.world().filter(|expected| expected.slot != world.slot) {
            let (policy, slot) = (inspection.name.name, Arc::clone(state.slot()));
            return Err(LoadError::WrongWorld { policy, found: world, slot, expected });
        }
        let policy = || inspection.name.name.clone();
        let _: serde_json::Map<String, serde_json::Value> = serde_json::from_str(settings)
            .map_err(|error| LoadError::SettingsSyntax { policy: policy(), reason: error.to_string() })?;
        let component = Component::new(self.engine(), bytes)
            .map_err(|error| LoadError::Compile { policy: policy(), reason: format!("{error:#}") })?;
        let pre = self
            .linker()
            .instantiate_pre(&component)
            .map_err(|error| LoadError::Link { policy: policy(), reason: format!("{error:#}") })?;
        let blueprint = Blueprint::new(inspection.clone(), settings.to_owned(), pre, self.shared().clone(), state)
            .map_err(|error| LoadError::Link { policy: policy(), reason: format!("{error:#}") })?;
        let version = PolicyVersion::new(blueprint);
        version.warm_up().map_err(|error| match error {
            SetupError::Refused(reason) => LoadError::Settings {
                policy: policy(),
                reason,
                accepted: accepted(&version.settings_schema().unwrap_or_default()),
            },
            SetupError::Fault(fault) => LoadError::Start { policy: policy(), fault },
        })?;
        (world.tried.probe)(&version).map_err(|failure| match failure {
            ProbeFailure { rows: None, fault } => LoadError::Start { policy: policy(), fault },
            ProbeFailure { rows: Some(rows), fault } => LoadError::Probe { policy: policy(), world, rows, fault },
        })?;
        Ok(version)
    }
}

/// Names and types of the settings that a schema describes.
fn accepted(schema: &str) -> String {
    let schema: serde_json::Value = serde_json::from_str(schema).unwrap_or_default();
    let Some(properties) = schema["properties"].as_object().filter(|properties| !properties.is_empty()) else {
        return "no settings".to_owned();
    };
    let describe = |(name, property): (&String, &serde_json::Value)| match property["type"].as_str() {
        Some(kind) => format!("{name} ({kind})"),
        None => name.clone(),
    };
    properties.iter().map(describe).collect::<Vec<_>>().join(", ")
}
