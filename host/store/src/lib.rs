//! Durable state: which policies a host's slots hold, and the components themselves.
//!
//! Contract: what a method has returned is on disk. Components lie beside the database as plain files named by their
//! digest, so that an operator can look at them and a damaged one is found by its name; whoever reads one compares
//! its digest. One process at a time owns a directory.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, Write},
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

use dynamo_host_core::{OnError, SlotName};
use serde::{Deserialize, Serialize};

/// Pages that sled keeps in memory: the state is a few kilobytes.
const CACHE_BYTES: u64 = 4 << 20;

/// Counts changes, in the database and in a file of this name. sled opens a damaged database as an older or empty one
/// without a word; if it is behind the file, something that was acknowledged is missing.
const GENERATION: &str = "generation";

/// State that cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process has it.
    #[error("state directory {path:?} is in use by another process; stop that, or give this host another --state-dir")]
    InUse {
        /// Which.
        path: PathBuf,
    },
    /// It cannot be opened.
    #[error(
        "state directory {path:?} cannot be read: {reason}; restore it from a backup, or move it away to start without state"
    )]
    Open {
        /// Which.
        path: PathBuf,
        /// What the database or the system said.
        reason: String,
    },
    /// A record is not what it should be.
    #[error("the state of slot {slot} in {path:?} cannot be read: {reason}; activate a policy to write it anew")]
    Record {
        /// Which directory.
        path: PathBuf,
        /// Which slot.
        slot: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A component is not there.
    #[error("policy component {path:?} cannot be read: {reason}; activate the policy again")]
    Component {
        /// The file.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// It could not be written.
    #[error("state directory {path:?} cannot be written: {reason}; nothing was changed")]
    Write {
        /// Which.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// It could not be written, and what was written of it could not be taken back.
    #[error(
        "state directory {path:?} cannot be written: {reason}; whether the change is there after a restart is open: \
         make room or mend the disk, then make the change again"
    )]
    Unsure {
        /// Which.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
}

/// What a slot held.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SlotRecord {
    /// Policies, oldest first; the last is active. `None` is the native fallback.
    pub versions: Vec<Option<VersionRecord>>,
    /// What the start-up configuration asked for when it last decided the slot.
    pub seed: Option<VersionRecord>,
    /// What happens when the policy fails, if that was ever said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_error: Option<OnError>,
    /// What the start-up configuration asked for of that, when it last decided it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_error_seed: Option<OnError>,
    /// Whether the kill switch is on.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub bypass: bool,
}

/// A policy with its settings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VersionRecord {
    /// `name@version`, for people.
    pub policy: String,
    /// Digest of the component, which names its file.
    pub digest: String,
    /// Settings, a JSON object.
    pub settings: String,
}

/// A host's state directory.
#[derive(Debug)]
pub struct Store {
    db: sled::Db,
    path: PathBuf,
}

impl Store {
    /// Opens a directory, or makes it.
    ///
    /// # Errors
    /// If another process has it, or it cannot be read.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let failed = |reason: String| StoreError::Open { path: path.to_owned(), reason };
        fs::create_dir_all(components(path)).map_err(|error| failed(error.to_string()))?;
        let config = sled::Config::new().path(path.join("state")).cache_capacity(CACHE_BYTES).flush_every_ms(None);
        // sled panics on some kinds of damage where it should return an error.
        match catch_unwind(AssertUnwindSafe(|| config.open())) {
            Ok(Ok(db)) => {
                let store = Self { db, path: path.to_owned() };
                let (found, acknowledged) = (store.generation(), store.acknowledged().map_err(failed)?);
                if found < acknowledged {
                    return Err(failed(format!("the database is damaged: it knows {found} changes of {acknowledged}")));
                }
                Ok(store)
            }
            Ok(Err(sled::Error::Io(error))) if is_locked(&error) => Err(StoreError::InUse { path: path.to_owned() }),
            Ok(Err(error)) => Err(failed(error.to_string())),
            Err(_) => Err(failed("the database is damaged".to_owned())),
        }
    }

    /// What a slot held.
    ///
    /// # Errors
    /// If its record cannot be read.
    pub fn slot(&self, slot: &SlotName) -> Result<Option<SlotRecord>, StoreError> {
        let failed = |reason: String| StoreError::Record { path: self.path.clone(), slot: slot.to_string(), reason };
        let Some(bytes) = self.db.get(key(slot)).map_err(|error| failed(error.to_string()))? else { return Ok(None) };
        serde_json::from_slice(&bytes).map(Some).map_err(|error| failed(error.to_string()))
    }

    /// Keeps what a slot holds, and lets go of components that no version needs any more.
    ///
    /// # Errors
    /// If it cannot be written. What was there before is then there again, or the error says that this is open.
    pub fn put_slot(&self, slot: &SlotName, record: &SlotRecord) -> Result<(), StoreError> {
        let bytes = serde_json::to_vec(record).map_err(|error| self.unwritten(&error))?;
        let before = self.db.get(key(slot)).map_err(|error| self.unwritten(&error))?;
        let generation = self.generation() + 1;
        let written = self.write(slot, Some(&bytes), generation).map_err(|error| error.to_string()).and_then(|()| {
            write_whole(&self.path.join(GENERATION), generation.to_string().as_bytes()).map_err(|error| error.to_string())
        });
        if let Err(reason) = written {
            let path = self.path.clone();
            // The generation stays: the file may have it already, and must not be ahead.
            return Err(match self.write(slot, before.as_deref(), generation) {
                Ok(()) => StoreError::Write { path, reason },
                Err(_) => StoreError::Unsure { path, reason },
            });
        }
        self.collect();
        Ok(())
    }

    /// Writes or removes a record, so that it is on disk.
    fn write(&self, slot: &SlotName, record: Option<&[u8]>, generation: u64) -> sled::Result<()> {
        let mut batch = sled::Batch::default();
        match record {
            Some(bytes) => batch.insert(key(slot).as_str(), bytes),
            None => batch.remove(key(slot).as_str()),
        }
        batch.insert(GENERATION, &generation.to_le_bytes());
        self.db.apply_batch(batch)?;
        self.db.flush().map(drop)
    }

    /// Changes that the database knows.
    fn generation(&self) -> u64 {
        let stored = self.db.get(GENERATION).ok().flatten();
        stored.and_then(|bytes| bytes.as_ref().try_into().ok()).map_or(0, u64::from_le_bytes)
    }

    /// Changes that were acknowledged.
    fn acknowledged(&self) -> Result<u64, String> {
        match fs::read_to_string(self.path.join(GENERATION)) {
            Ok(text) => text.trim().parse().map_err(|_| format!("its file `{GENERATION}` is damaged")),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Keeps a component.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn put_component(&self, digest: &str, bytes: &[u8]) -> Result<(), StoreError> {
        write_whole(&self.component_path(digest), bytes).map_err(|error| self.unwritten(&error))
    }

    /// A component's bytes, as they lie there.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn component(&self, digest: &str) -> Result<Vec<u8>, StoreError> {
        let path = self.component_path(digest);
        fs::read(&path).map_err(|error| StoreError::Component { reason: error.to_string(), path })
    }

    /// Where a component lies.
    #[must_use]
    pub fn component_path(&self, digest: &str) -> PathBuf {
        components(&self.path).join(format!("{digest}.wasm"))
    }

    /// Removes components that no slot names, and what was left of writing one. Nothing else is touched: the directory
    /// may be one that others use too. What fails is tried again at the next change.
    fn collect(&self) {
        let mut needed = BTreeSet::new();
        for value in self.db.scan_prefix("slot/").values() {
            let Some(record) = value.ok().and_then(|bytes| serde_json::from_slice::<SlotRecord>(&bytes).ok()) else { return };
            needed.extend(record.versions.into_iter().flatten().map(|version| format!("{}.wasm", version.digest)));
        }
        let Ok(files) = fs::read_dir(components(&self.path)) else { return };
        for file in files.flatten() {
            if file.file_name().to_str().is_some_and(|name| is_ours(name) && !needed.contains(name)) {
                let _ = fs::remove_file(file.path());
            }
        }
    }

    fn unwritten(&self, error: &dyn std::error::Error) -> StoreError {
        StoreError::Write { path: self.path.clone(), reason: error.to_string() }
    }
}

/// Writes a file so that after a crash it is there whole, or as it was.
fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("partial");
    let mut file = File::create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    path.parent().map_or(Ok(()), |directory| File::open(directory)?.sync_all())
}

/// Whether a file has a name that [`Store`] gives: a digest, and what it is.
fn is_ours(name: &str) -> bool {
    let is_digest = |text: &str| text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    name.split_once('.').is_some_and(|(digest, kind)| is_digest(digest) && matches!(kind, "wasm" | "partial"))
}

fn components(path: &Path) -> PathBuf {
    path.join("policies")
}

fn key(slot: &SlotName) -> String {
    format!("slot/{slot}")
}

fn is_locked(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock || error.to_string().contains("could not acquire lock")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(digest: &str) -> Option<VersionRecord> {
        Some(VersionRecord { policy: "p@1".to_owned(), digest: digest.to_owned(), settings: "{}".to_owned() })
    }

    fn record(digests: &[&str]) -> SlotRecord {
        SlotRecord { versions: digests.iter().map(|digest| version(digest)).collect(), ..SlotRecord::default() }
    }

    /// Opens a directory anew: the database's own threads let go of it a little later than who dropped it.
    fn reopen(path: &Path) -> Result<Store, StoreError> {
        for _ in 0..6000 {
            match Store::open(path) {
                Err(StoreError::InUse { .. }) => std::thread::sleep(std::time::Duration::from_millis(10)),
                opened => return opened,
            }
        }
        panic!("not within 60 s: {} is let go of", path.display());
    }

    #[test]
    fn a_slot_is_there_after_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        assert_eq!(store.slot(&SlotName::ROUTING).unwrap(), None);
        store.put_component("aa", b"bytes").unwrap();
        store.put_slot(&SlotName::ROUTING, &record(&["aa"])).unwrap();
        drop(store);
        let store = reopen(directory.path()).unwrap();
        assert_eq!(store.slot(&SlotName::ROUTING).unwrap(), Some(record(&["aa"])));
        assert_eq!(store.component("aa").unwrap(), b"bytes");
    }

    #[test]
    fn components_that_nothing_needs_are_removed_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let [old, new] = ["a", "b"].map(|digit| digit.repeat(64));
        for digest in [&old, &new] {
            store.put_component(digest, b"x").unwrap();
        }
        // As a build's output has them: `--state-dir target`.
        let others = ["round-robin.wasm", "README", &format!("{old}.txt"), &format!("{}.wasm", "A".repeat(64))];
        let in_policies = |name: &str| directory.path().join("policies").join(name);
        others.iter().for_each(|name| fs::write(in_policies(name), "x").unwrap());
        fs::write(in_policies(&format!("{old}.partial")), "x").unwrap();
        store.put_slot(&SlotName::ROUTING, &record(&[&new])).unwrap();
        assert!(store.component(&old).unwrap_err().to_string().contains("activate the policy again"));
        assert!(!in_policies(&format!("{old}.partial")).exists());
        store.component(&new).unwrap();
        others.iter().for_each(|name| assert!(in_policies(name).exists(), "{name}"));
    }

    #[test]
    fn a_change_that_cannot_be_written_leaves_what_was_there() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        store.put_slot(&SlotName::ROUTING, &record(&["aa"])).unwrap();
        // A directory in the place of the file: it can be written after the database only.
        let file = directory.path().join(GENERATION);
        let acknowledged = fs::read(&file).unwrap();
        fs::remove_file(&file).unwrap();
        fs::create_dir(&file).unwrap();
        let error = store.put_slot(&SlotName::ROUTING, &record(&["bb"])).unwrap_err().to_string();
        assert!(error.contains("nothing was changed"), "{error}");
        assert_eq!(store.slot(&SlotName::ROUTING).unwrap(), Some(record(&["aa"])));
        drop(store);
        fs::remove_dir(&file).unwrap();
        fs::write(&file, acknowledged).unwrap();
        assert_eq!(reopen(directory.path()).unwrap().slot(&SlotName::ROUTING).unwrap(), Some(record(&["aa"])));
    }

    #[test]
    fn a_second_process_is_told_that_the_directory_is_in_use() {
        let directory = tempfile::tempdir().unwrap();
        let _first = Store::open(directory.path()).unwrap();
        assert!(matches!(Store::open(directory.path()), Err(StoreError::InUse { .. })));
    }

    #[test]
    fn a_record_of_another_shape_is_an_error_not_a_panic() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        store.db.insert(key(&SlotName::ROUTING), b"{\"versions\":7}").unwrap();
        let error = store.slot(&SlotName::ROUTING).unwrap_err().to_string();
        assert!(error.contains("slot routing") && error.contains("activate a policy"), "{error}");
    }

    #[test]
    fn a_damaged_database_is_an_error_not_a_panic_and_not_an_empty_state() {
        for file in ["db", "conf"] {
            for damage in [&b"garbage"[..], b""] {
                let directory = tempfile::tempdir().unwrap();
                let store = Store::open(directory.path()).unwrap();
                store.put_slot(&SlotName::ROUTING, &record(&["aa"])).unwrap();
                drop(store);
                fs::write(directory.path().join("state").join(file), damage).unwrap();
                // sled can do without some of its files: then all must be there.
                match reopen(directory.path()) {
                    Ok(store) => assert_eq!(store.slot(&SlotName::ROUTING).unwrap(), Some(record(&["aa"])), "{file}"),
                    Err(error) => {
                        let error = error.to_string();
                        assert!(error.contains("cannot be read") && error.contains("move it away"), "{file}: {error}");
                    }
                }
            }
        }
    }
}
