//! What a component reads and says: the functions that it imports, by interface. Told from its types, without running it.

use std::collections::BTreeMap;

use wit_component::DecodedWasm;
use wit_parser::WorldItem;

/// Functions by the interface of the contract that they belong to.
pub(super) type Uses = BTreeMap<String, Vec<String>>;

/// Interfaces of the contract with what the use of each means, in the order of a report.
const MEANINGS: [(&str, &str); 11] = [
    ("request", "reads of the request"),
    ("candidates", "reads of candidates"),
    ("links", "reads of links"),
    ("admission-pools", "reads of pools"),
    ("outcomes", "learns from outcomes"),
    ("state", "keeps state"),
    ("clock", "reads the clock"),
    ("entropy", "draws randomness"),
    ("routing-answer", "answers by"),
    ("admission-answer", "answers by"),
    ("telemetry", "says by"),
];

/// Reads the imports of a component.
///
/// # Errors
/// If it cannot be decoded.
pub(super) fn of(component: &[u8]) -> Result<Uses, String> {
    let decoded = wit_component::decode(component).map_err(|error| format!("its types cannot be read: {error:#}"))?;
    let DecodedWasm::Component(resolve, world) = decoded else { return Ok(Uses::new()) };
    let mut uses = Uses::new();
    for item in resolve.worlds[world].imports.values() {
        if let WorldItem::Interface { id, .. } = item {
            let interface = &resolve.interfaces[*id];
            let functions: Vec<String> = interface.functions.keys().cloned().collect();
            if let (Some(name), false) = (&interface.name, functions.is_empty()) {
                uses.entry(name.clone()).or_default().extend(functions);
            }
        }
    }
    Ok(uses)
}

/// Lines of a report: what a use means, and its functions.
pub(super) fn lines(uses: &Uses) -> impl Iterator<Item = (&'static str, String)> {
    MEANINGS.iter().filter_map(|(interface, meaning)| Some((*meaning, uses.get(*interface)?.join(", "))))
}
