//! Reads what a component says of itself, without compiling or running it.

use serde::Serialize;
use wasmparser::{Parser, Payload};

use crate::{
    abi,
    identity::{Digest, PolicyName},
    load::LoadError,
    world::{LIFECYCLE, World},
};

/// Name of the custom section that names a policy.
const SECTION: &str = "dynamo:policy";

/// What a component says of itself.
#[derive(Clone, Debug, Serialize)]
pub struct Inspection {
    /// Name, version and author.
    #[serde(flatten)]
    pub name: PolicyName,
    /// SHA-256 of its bytes.
    #[serde(serialize_with = "as_text")]
    pub digest: Digest,
    /// Its size.
    pub bytes: usize,
    /// The world that it is for.
    pub world: &'static World,
    /// Interfaces that it imports: what it can read and say.
    pub imports: Vec<String>,
    /// Interfaces that it exports.
    pub exports: Vec<String>,
}

fn as_text<S: serde::Serializer>(digest: &Digest, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(digest)
}

impl Inspection {
    /// Whether it imports an interface of the contract.
    #[must_use]
    pub fn imports_interface(&self, interface: &str) -> bool {
        self.imports.iter().any(|import| contract_interface(import).is_ok_and(|name| name == interface))
    }

    /// The full name under which it exports an interface of the contract.
    pub(crate) fn export(&self, interface: &str) -> Option<&str> {
        self.exports.iter().find(|export| contract_interface(export).is_ok_and(|name| name == interface)).map(String::as_str)
    }
}

/// Inspects a policy.
///
/// # Errors
/// Says why the bytes are not a policy that this host can run, and what to do about it.
pub fn inspect(bytes: &[u8], max_bytes: usize) -> Result<Inspection, LoadError> {
    let sections = read_sections(bytes, max_bytes)?;
    let name = match sections.description {
        Some(section) => PolicyName::parse(section).map_err(|reason| LoadError::Description { reason })?,
        None => return Err(LoadError::Description { reason: "is missing".to_owned() }),
    };
    let inspection = Inspection {
        digest: Digest::of(bytes),
        bytes: bytes.len(),
        world: world(&name, &sections.exports)?,
        imports: sections.imports,
        exports: sections.exports,
        name,
    };
    let policy = || inspection.name.name.clone();
    for import in &inspection.imports {
        match contract_interface(import) {
            Ok(interface) if inspection.world.imports.contains(&interface) => {}
            Err(Some(version)) => return Err(LoadError::ContractVersion { policy: policy(), found: version.to_owned() }),
            _ => {
                return Err(LoadError::ForbiddenImport { policy: policy(), world: inspection.world, import: import.clone() });
            }
        }
    }
    for interface in [LIFECYCLE, inspection.world.decides.0] {
        if inspection.export(interface).is_none() {
            return Err(LoadError::MissingExport {
                policy: policy(),
                world: inspection.world,
                export: abi::interface(interface),
            });
        }
    }
    Ok(inspection)
}

fn world(policy: &PolicyName, exports: &[String]) -> Result<&'static World, LoadError> {
    for export in exports {
        match contract_interface(export) {
            Ok(interface) => {
                if let Some(world) = World::ALL.into_iter().find(|world| world.decides.0 == interface) {
                    return Ok(world);
                }
            }
            Err(Some(version)) => {
                return Err(LoadError::ContractVersion { policy: policy.name.clone(), found: version.to_owned() });
            }
            Err(None) => {}
        }
    }
    let found = if exports.is_empty() { "nothing".to_owned() } else { exports.join(", ") };
    Err(LoadError::NoWorld { policy: policy.name.clone(), found })
}

/// The interface that a full name stands for, if it is one of the contract in a version that this host speaks. Error:
/// the version of the contract, if it is another.
fn contract_interface(full: &str) -> Result<&str, Option<&str>> {
    let (interface, version) = full.strip_prefix("dynamo:policy/").and_then(|rest| rest.split_once('@')).ok_or(None)?;
    // Versions below 1.0 are compatible within a minor version.
    let minor = |version: &str| version.rsplit_once('.').map(|(minor, _)| minor.to_owned());
    if minor(version) == minor(abi::VERSION) { Ok(interface) } else { Err(Some(version)) }
}

struct Sections<'a> {
    description: Option<&'a [u8]>,
    imports: Vec<String>,
    exports: Vec<String>,
}

fn read_sections(bytes: &[u8], max_bytes: usize) -> Result<Sections<'_>, LoadError> {
    if bytes.is_empty() {
        return Err(LoadError::Empty);
    }
    if bytes.len() > max_bytes {
        return Err(LoadError::TooLarge { bytes: bytes.len(), max_bytes });
    }
    match bytes.get(..8) {
        Some([0, b'a', b's', b'm', 1, 0, 0, 0]) => return Err(LoadError::CoreModule),
        Some([0, b'a', b's', b'm', _, _, 1, 0]) => {}
        _ => return Err(LoadError::NotWasm),
    }
    let mut sections = Sections { description: None, imports: Vec::new(), exports: Vec::new() };
    let mut depth = 0;
    for payload in Parser::new(0).parse_all(bytes) {
        let payload = payload.map_err(|error| LoadError::Malformed { reason: error.to_string() })?;
        let malformed = |error: wasmparser::BinaryReaderError| LoadError::Malformed { reason: error.to_string() };
        match payload {
            Payload::ModuleSection { .. } | Payload::ComponentSection { .. } => depth += 1,
            Payload::End(_) => depth -= 1,
            Payload::ComponentImportSection(imports) if depth == 0 => {
                for import in imports {
                    sections.imports.push(import.map_err(malformed)?.name.name.to_owned());
                }
            }
            Payload::ComponentExportSection(exports) if depth == 0 => {
                for export in exports {
                    sections.exports.push(export.map_err(malformed)?.name.name.to_owned());
                }
            }
            // At any depth: toolchains leave it in the core module that they wrap.
            Payload::CustomSection(custom) if custom.name() == SECTION => sections.description = Some(custom.data()),
            _ => {}
        }
    }
    Ok(sections)
}
