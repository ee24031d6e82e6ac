//! Names of workers that an operator drains: kept over restarts where there is a state directory.
//!
//! Contract: what a method has returned is on disk. A name stays until it is resumed, also while no source has such a
//! worker: one that comes back is still drained.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

/// The file's name within the state directory.
const FILE: &str = "drained.json";
/// Most names: each is an operator's command.
const MAX_NAMES: usize = 10_000;

/// Why a drain or its end was not taken down.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DrainedError {
    #[error("{path:?} cannot be written: {reason}; nothing was changed")]
    Unwritten { path: PathBuf, reason: String },
    #[error("{MAX_NAMES} workers are drained; resume some that are gone first")]
    Full,
}

/// The drained names.
#[derive(Debug, Default)]
pub(super) struct Drained {
    names: BTreeSet<String>,
    file: Option<PathBuf>,
}

impl Drained {
    /// Reads what was kept in a state directory.
    ///
    /// # Errors
    /// If there is something that is not understood: it says so, and begins with no name.
    pub(super) fn open(state_dir: Option<&Path>) -> (Self, Option<String>) {
        let Some(file) = state_dir.map(|directory| directory.join(FILE)) else { return (Self::default(), None) };
        let read = match fs::read(&file) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| error.to_string()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(BTreeSet::new()),
            Err(error) => Err(error.to_string()),
        };
        let trouble = read
            .as_ref()
            .err()
            .map(|reason| format!("{file:?} cannot be read: {reason}; no worker is drained, until one is drained again"));
        (Self { names: read.unwrap_or_default(), file: Some(file) }, trouble)
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.names.contains(name)
    }

    /// Drains or resumes. Blocks on the disk.
    pub(super) fn set(&mut self, name: &str, drained: bool) -> Result<(), DrainedError> {
        let mut names = self.names.clone();
        let is_news = if drained { names.insert(name.to_owned()) } else { names.remove(name) };
        if !is_news {
            return Ok(());
        }
        if names.len() > MAX_NAMES {
            return Err(DrainedError::Full);
        }
        if let Some(path) = &self.file {
            write_whole(path, &names)
                .map_err(|error| DrainedError::Unwritten { path: path.clone(), reason: error.to_string() })?;
        }
        self.names = names;
        Ok(())
    }
}

/// Writes a file so that after a crash it is there whole, or as it was.
fn write_whole(path: &Path, names: &BTreeSet<String>) -> io::Result<()> {
    let temporary = path.with_extension("partial");
    let directory = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(directory)?;
    let mut file = File::create(&temporary)?;
    file.write_all(&serde_json::to_vec(names)?)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_kept_until_they_are_resumed() {
        let directory = tempfile::tempdir().unwrap();
        let open = || Drained::open(Some(directory.path()));
        let (mut drained, trouble) = open();
        assert!(trouble.is_none() && !drained.contains("a"));
        drained.set("a", true).unwrap();
        drained.set("b", true).unwrap();
        drained.set("b", false).unwrap();
        let (drained, _) = open();
        assert!(drained.contains("a") && !drained.contains("b"));
    }

    #[test]
    fn what_cannot_be_written_is_not_done_and_what_cannot_be_read_is_said() {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("state");
        let (mut drained, _) = Drained::open(Some(&state));
        fs::write(&state, "a file where the directory should be").unwrap();
        assert!(drained.set("a", true).unwrap_err().to_string().contains("nothing was changed"));
        assert!(!drained.contains("a"));
        fs::write(directory.path().join(FILE), "{").unwrap();
        let (_, trouble) = Drained::open(Some(directory.path()));
        assert!(trouble.unwrap().contains("drained again"));
    }
}
