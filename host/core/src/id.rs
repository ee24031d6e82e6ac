//! Stable identities: 64-bit hashes that are equal on every host and in every run.

use std::fmt;

use xxhash_rust::xxh3::xxh3_64;

/// Identity of a worker: a hash of namespace, worker name, model and data-parallel rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerId(pub u64);

impl WorkerId {
    /// The id that every host gives this worker.
    #[must_use]
    pub fn new(namespace: &str, name: &str, model: &str, rank: u32) -> Self {
        // A separator that no part can contain keeps ("a", "bc") and ("ab", "c") apart.
        Self(xxh3_64(format!("{namespace}\0{name}\0{model}\0{rank}").as_bytes()))
    }
}

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// Key of a string that policies may compare and store, but not read: tenant, session, prompt prefix.
#[must_use]
pub fn key(text: &[u8]) -> u64 {
    xxh3_64(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worker_id_depends_on_every_part_and_on_their_borders() {
        let id = WorkerId::new("default", "a", "m", 0);
        assert_eq!(id, WorkerId::new("default", "a", "m", 0));
        for other in [
            WorkerId::new("other", "a", "m", 0),
            WorkerId::new("default", "b", "m", 0),
            WorkerId::new("default", "a", "n", 0),
            WorkerId::new("default", "a", "m", 1),
            WorkerId::new("default", "am", "", 0),
        ] {
            assert_ne!(id, other);
        }
    }

    #[test]
    fn worker_id_is_the_same_in_every_release() {
        // Receipts, affinity and policy state hold these ids: a change of the hash is a breaking change.
        assert_eq!(WorkerId::new("default", "127.0.0.1:8000", "tiny", 0).to_string(), "519428f9409f4d11");
    }
}
