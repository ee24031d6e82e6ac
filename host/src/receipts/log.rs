//! The files of the receipts: `receipts-NNNNNNNN.jsonl`, written to the newest, the oldest removed.
//!
//! Contract: lines are handed to the system at once and never synced by themselves: a host that dies loses none, a machine that
//! dies loses what the system had not written yet. Receipts are advice, and a sync per batch would cost the disk more
//! than they are worth. What was half written is cut off again, and a reader skips what could not be.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
};

const PREFIX: &str = "receipts-";
const SUFFIX: &str = ".jsonl";

/// The files, and the one that is written.
pub(super) struct Log {
    folder: PathBuf,
    max_bytes: u64,
    files: u32,
    open: Option<Open>,
}

struct Open {
    number: u64,
    file: File,
    bytes: u64,
}

impl Log {
    pub(super) fn new(folder: PathBuf, max_bytes: u64, files: u32) -> Self {
        Self { folder, max_bytes, files, open: None }
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Appends whole lines.
    ///
    /// # Errors
    /// What the system says; none of them is there then. The next call tries anew.
    pub(super) fn append(&mut self, lines: &[u8]) -> io::Result<()> {
        let mut open = match self.open.take() {
            Some(open) if open.bytes + lines.len() as u64 <= self.max_bytes || open.bytes == 0 => open,
            Some(full) => self.create(full.number + 1)?,
            None => self.resume()?,
        };
        if let Err(error) = open.file.write_all(lines) {
            // A line that is half there would spoil the next one. If it cannot be cut off either, the next file begins anew.
            let _ = open.file.set_len(open.bytes);
            return Err(error);
        }
        open.bytes += lines.len() as u64;
        self.open = Some(open);
        Ok(())
    }

    /// Goes on in the newest file if it has room and ends in a whole line.
    fn resume(&self) -> io::Result<Open> {
        make_folder(&self.folder)?;
        let Some((number, path)) = numbered(&self.folder)?.pop() else { return self.create(1) };
        let bytes = fs::metadata(&path)?.len();
        if bytes >= self.max_bytes || !ends_whole(&path)? {
            return self.create(number + 1);
        }
        let file = OpenOptions::new().append(true).open(path)?;
        Ok(Open { number, file, bytes })
    }

    fn create(&self, number: u64) -> io::Result<Open> {
        make_folder(&self.folder)?;
        let path = self.folder.join(format!("{PREFIX}{number:08}{SUFFIX}"));
        let file = private(OpenOptions::new().append(true).create(true)).open(path)?;
        let mut numbered = numbered(&self.folder)?;
        let keep = self.files.max(1) as usize;
        let surplus = numbered.len().saturating_sub(keep);
        for (_, path) in numbered.drain(..surplus) {
            fs::remove_file(path)?;
        }
        Ok(Open { number, file, bytes: 0 })
    }
}

/// Who asked what when is for this user alone.
fn make_folder(folder: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)
}

fn private(options: &mut OpenOptions) -> &mut OpenOptions {
    use std::os::unix::fs::OpenOptionsExt;
    options.mode(0o600)
}

fn ends_whole(path: &Path) -> io::Result<bool> {
    use std::io::{Read, Seek, SeekFrom};
    let mut file = File::open(path)?;
    if file.metadata()?.len() == 0 {
        return Ok(true);
    }
    file.seek(SeekFrom::End(-1))?;
    let mut last = [0];
    file.read_exact(&mut last)?;
    Ok(last == *b"\n")
}

/// The number of a file of receipts; `None` if it is none.
pub(super) fn number(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.strip_prefix(PREFIX)?.strip_suffix(SUFFIX)?.parse().ok()
}

/// The files of a folder with their numbers, oldest first.
pub(super) fn numbered(folder: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        files.extend(number(&path).map(|number| (number, path)));
    }
    files.sort_unstable();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<u64> {
        numbered(folder).unwrap().into_iter().map(|(number, _)| number).collect()
    }

    #[test]
    fn files_are_filled_one_after_the_other_and_the_oldest_go() {
        let directory = tempfile::tempdir().unwrap();
        let folder = directory.path().join("receipts");
        let mut log = Log::new(folder.clone(), 10, 3);
        for _ in 0..5 {
            log.append(b"12345678\n").unwrap();
        }
        assert_eq!(names(&folder), [3, 4, 5]);
        log.append(&[b'x'; 100]).unwrap();
        assert_eq!(names(&folder), [4, 5, 6], "what is longer than a file has one of its own");
        // The next run: the newest is over its size, and does not end in a whole line.
        Log::new(folder.clone(), 1000, 3).append(b"a\n").unwrap();
        Log::new(folder.clone(), 1000, 3).append(b"b\n").unwrap();
        assert_eq!(names(&folder), [5, 6, 7]);
        assert_eq!(fs::read(folder.join("receipts-00000007.jsonl")).unwrap(), b"a\nb\n", "a whole one is gone on with");
    }

    #[test]
    fn a_full_disk_is_an_error_and_the_next_try_is_another() {
        let directory = tempfile::tempdir().unwrap();
        let folder = directory.path().join("receipts");
        make_folder(&folder).unwrap();
        let full = folder.join("receipts-00000001.jsonl");
        std::os::unix::fs::symlink("/dev/full", &full).unwrap();
        let mut log = Log::new(folder.clone(), 1000, 3);
        assert_eq!(log.append(b"a\n").unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!(log.append(b"a\n").unwrap_err().kind(), io::ErrorKind::StorageFull);
        fs::remove_file(full).unwrap();
        log.append(b"a\n").unwrap();
        assert_eq!(fs::read(folder.join("receipts-00000001.jsonl")).unwrap(), b"a\n");
    }
}
