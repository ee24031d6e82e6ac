//! The audit file: what was changed in a running host, when, and by whom. `STATE_DIR/audit.jsonl`, one JSON object on each line.
//!
//! Contract: a change is on disk here before it is answered, the refused ones too. What cannot be written is said in the answer,
//! the log and the metrics, and hinders nothing: the kill switch has to work on a full disk. The file is only ever appended
//! to; full, it becomes `audit.jsonl.1`, and so on up to [`OLD_FILES`], so that all together hold a bounded number of bytes.
//! It is opened for each line: changes are rare, and whatever moves the file away or frees the disk meanwhile is noticed.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    net::SocketAddr,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use serde::Serialize;
use serde_json::Value;

use crate::{
    clock::{unix_ms, utc},
    text::plain,
};

/// Bytes of one file: some ten thousand changes.
const MAX_FILE_BYTES: u64 = 4 << 20;

/// Full files that are kept beside the one that is written.
const OLD_FILES: u32 = 4;

/// Who changed something.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Who {
    /// The host did by itself.
    Host,
    /// A signal to the process, or a file that was edited.
    System(&'static str),
    /// A client of the admin API.
    Client {
        peer: Option<SocketAddr>,
        /// Whether it showed the admin token.
        token: bool,
        /// SHA-256 of the certificate that it showed.
        #[serde(skip_serializing_if = "Option::is_none")]
        certificate: Option<String>,
    },
}

/// One change, or one that was refused.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Entry {
    /// In UTC.
    pub(crate) at: String,
    pub(crate) unix_ms: u64,
    pub(crate) what: &'static str,
    pub(crate) who: Who,
    /// A slot's or a worker's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) of: Option<String>,
    /// How it was before.
    #[serde(skip_serializing_if = "Value::is_null")]
    pub(crate) from: Value,
    /// How it is now.
    #[serde(skip_serializing_if = "Value::is_null")]
    pub(crate) to: Value,
    /// Why it was refused, or what is wrong with it; `None`: it was done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) refused: Option<String>,
}

impl Entry {
    /// Something that happens now.
    pub(crate) fn new(what: &'static str, who: Who, of: Option<String>) -> Self {
        let unix_ms = unix_ms();
        Self { at: utc(unix_ms), unix_ms, what, who, of, from: Value::Null, to: Value::Null, refused: None }
    }
}

/// The audit file, or none.
#[derive(Clone)]
pub(crate) struct Audit {
    file: Option<Arc<Mutex<AuditFile>>>,
    /// Changes take turns, so that what each says of before and after is its own. The kill switch waits for no turn.
    pub(crate) turn: Arc<tokio::sync::Mutex<()>>,
}

struct AuditFile {
    path: PathBuf,
    max_bytes: u64,
}

impl Audit {
    /// In a state directory; without one, changes are in the log only.
    pub(crate) fn open(state_dir: Option<&Path>) -> Self {
        let file = |directory: &Path| AuditFile { path: directory.join("audit.jsonl"), max_bytes: MAX_FILE_BYTES };
        Self { file: state_dir.map(|directory| Arc::new(Mutex::new(file(directory)))), turn: Arc::default() }
    }

    /// Appends an entry. Returns why it is not on disk, if it should be and is not.
    ///
    /// # Cancel safety
    /// It is appended, whoever waits for it.
    pub(crate) async fn append(&self, entry: Entry) -> Option<String> {
        let audit = self.clone();
        let appended = tokio::task::spawn_blocking(move || audit.append_blocking(&entry)).await;
        appended.unwrap_or_else(|error| Some(error.to_string()))
    }

    /// The same for whoever may block.
    pub(crate) fn append_blocking(&self, entry: &Entry) -> Option<String> {
        let line = serde_json::to_string(entry).unwrap_or_default();
        tracing::info!(target: "audit", "{line}");
        let file = self.file.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner);
        let error = file.append(&line).err()?;
        metrics::counter!("dynamo_host_audit_failures_total").increment(1);
        let reason = plain(&format!("{:?} cannot be written: {error}", file.path));
        tracing::error!("a change is not in the audit file: {reason}; free or mend the disk");
        Some(reason)
    }

    /// The newest entries, oldest first; at most so many.
    ///
    /// # Errors
    /// In words for people.
    pub(crate) fn newest(&self, most: usize) -> Result<Vec<Value>, String> {
        let Some(file) = &self.file else {
            return Err("this host has no --state-dir, so that it keeps no audit file; changes are in its log".to_owned());
        };
        let file = file.lock().unwrap_or_else(PoisonError::into_inner);
        file.newest(most).map_err(|error| plain(&format!("{:?} cannot be read: {error}", file.path)))
    }
}

impl AuditFile {
    /// Appends a line and waits until it is on disk. If it cannot be, none of it is there.
    fn append(&self, line: &str) -> io::Result<()> {
        let mut file = self.open()?;
        let mut bytes = file.metadata()?.len();
        if bytes > 0 && bytes + line.len() as u64 >= self.max_bytes {
            drop(file);
            self.rotate()?;
            file = self.open()?;
            bytes = file.metadata()?.len();
        }
        // What a crash left half written must not spoil this line.
        let begin = if ends_whole(&mut file)? { "" } else { "\n" };
        let written = file.write_all(format!("{begin}{line}\n").as_bytes()).and_then(|()| file.sync_data());
        if written.is_err() {
            // It may not be there to be cut off.
            let _ = file.set_len(bytes);
        }
        written
    }

    fn open(&self) -> io::Result<File> {
        OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(&self.path)
    }

    /// Moves each file one further; the oldest is overwritten.
    fn rotate(&self) -> io::Result<()> {
        for age in (1..OLD_FILES).rev().filter(|&age| self.old(age).exists()) {
            fs::rename(self.old(age), self.old(age + 1))?;
        }
        fs::rename(&self.path, self.old(1))?;
        // That it is gone must be on disk before something new has its name.
        self.path.parent().map_or(Ok(()), |directory| File::open(directory)?.sync_all())
    }

    fn old(&self, age: u32) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(format!(".{age}"));
        name.into()
    }

    fn newest(&self, most: usize) -> io::Result<Vec<Value>> {
        let mut entries = Vec::new();
        for path in std::iter::once(self.path.clone()).chain((1..=OLD_FILES).map(|age| self.old(age))) {
            let mut text = Vec::new();
            match File::open(&path) {
                // It is as large as it may be, at most.
                Ok(file) => file.take(self.max_bytes * 2).read_to_end(&mut text)?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                Err(error) => return Err(error),
            };
            let lines = text.rsplit(|&byte| byte == b'\n');
            // What was half written is no entry.
            entries.extend(lines.filter_map(|line| serde_json::from_slice(line).ok()).take(most - entries.len()));
            if entries.len() == most {
                break;
            }
        }
        entries.reverse();
        Ok(entries)
    }
}

fn ends_whole(file: &mut File) -> io::Result<bool> {
    if file.metadata()?.len() == 0 {
        return Ok(true);
    }
    let mut last = [0];
    file.seek(SeekFrom::End(-1))?;
    file.read_exact(&mut last)?;
    Ok(last == *b"\n")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn audit(directory: &Path, max_bytes: u64) -> Audit {
        let file = AuditFile { path: directory.join("audit.jsonl"), max_bytes };
        Audit { file: Some(Arc::new(Mutex::new(file))), turn: Arc::default() }
    }

    fn entry(number: u64) -> Entry {
        Entry { to: json!(number), ..Entry::new("test", Who::Host, None) }
    }

    fn numbers(audit: &Audit, most: usize) -> Vec<u64> {
        audit.newest(most).unwrap().iter().map(|entry| entry["to"].as_u64().unwrap()).collect()
    }

    #[test]
    fn full_files_are_moved_on_and_the_oldest_go() {
        let directory = tempfile::tempdir().unwrap();
        let audit = audit(directory.path(), 300);
        for number in 0..50 {
            assert_eq!(audit.append_blocking(&entry(number)), None);
        }
        let files = fs::read_dir(directory.path()).unwrap().map(|file| file.unwrap().metadata().unwrap().len());
        let files: Vec<_> = files.collect();
        assert_eq!(files.len(), 1 + OLD_FILES as usize);
        assert!(files.iter().all(|&bytes| bytes <= 300), "{files:?}");
        assert_eq!(numbers(&audit, 3), [47, 48, 49]);
        let all = numbers(&audit, 1000);
        assert!(all.len() > 5 && all.is_sorted() && all.last() == Some(&49), "{all:?}");
    }

    #[test]
    fn what_was_half_written_is_skipped_and_spoils_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let audit = audit(directory.path(), 10_000);
        audit.append_blocking(&entry(1));
        let mut file = OpenOptions::new().append(true).open(directory.path().join("audit.jsonl")).unwrap();
        file.write_all(b"{\"at\":").unwrap();
        audit.append_blocking(&entry(2));
        assert_eq!(numbers(&audit, 9), [1, 2]);
    }

    #[test]
    fn a_full_disk_is_said_and_the_next_try_is_another() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("audit.jsonl");
        std::os::unix::fs::symlink("/dev/full", &path).unwrap();
        let audit = audit(directory.path(), 10_000);
        assert!(audit.append_blocking(&entry(1)).unwrap().contains("audit.jsonl"));
        fs::remove_file(&path).unwrap();
        assert_eq!(audit.append_blocking(&entry(2)), None);
        assert_eq!(numbers(&audit, 9), [2]);
    }

    #[test]
    fn without_a_state_directory_nothing_is_kept_and_nothing_is_wrong() {
        let audit = Audit::open(None);
        assert_eq!(audit.append_blocking(&entry(1)), None);
        assert!(audit.newest(1).unwrap_err().contains("--state-dir"));
    }
}
