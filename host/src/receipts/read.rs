//! Reads receipts back: of a running host's state directory, of their folder, or of one file such as `receipts export` writes.
//!
//! Contract: what cannot be read is counted and named by file and line, and no reason to stop: the last line of a file may be
//! half written, and a later release may write what this one does not know.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use serde::Deserialize;

use super::{
    FOLDER, Line,
    line::VERSION,
    log::{number, numbered},
};

/// Why there is nothing to read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    #[error("{path:?} has no receipts; name the --state-dir of a host that writes them, their folder, or a file of them")]
    None { path: PathBuf },
    #[error("receipts {path:?} cannot be read: {error}")]
    Unreadable { path: PathBuf, error: io::Error },
}

/// Files of receipts, oldest first.
pub(crate) struct Source {
    files: Vec<PathBuf>,
    /// Where the last one ends, if the rest of it is followed.
    end: Option<u64>,
}

/// Lines that could not be read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Skipped {
    pub(crate) lines: u64,
    /// Where and why the first of them could not.
    pub(crate) first: Option<String>,
}

/// What the first glance at a line tells.
#[derive(Deserialize)]
struct Versioned {
    v: u32,
}

/// Reads one line.
///
/// # Errors
/// Why it is none of ours.
pub(crate) fn parse(text: &str) -> Result<Line, String> {
    let Versioned { v } = serde_json::from_str(text).map_err(|error| format!("it is no receipt: {error}"))?;
    if v > VERSION {
        return Err(format!("it is of version {v}; this release reads {VERSION}"));
    }
    serde_json::from_str(text).map_err(|error| format!("it is no receipt: {error}"))
}

impl Source {
    /// What lies there.
    ///
    /// # Errors
    /// If that is nothing.
    pub(crate) fn of(path: &Path) -> Result<Self, ReadError> {
        let none = || ReadError::None { path: path.to_owned() };
        if path.is_file() {
            return Ok(Self { files: vec![path.to_owned()], end: None });
        }
        for folder in [path.join(FOLDER), path.to_owned()] {
            let files: Vec<_> = numbered(&folder).unwrap_or_default().into_iter().map(|(_, file)| file).collect();
            if !files.is_empty() {
                return Ok(Self { files, end: None });
            }
        }
        Err(none())
    }

    /// Gives each line that can be read to `take`, oldest first.
    ///
    /// # Errors
    /// If a file cannot be read. One that was removed meanwhile is no error: the host makes room.
    pub(crate) fn each(&self, mut take: impl FnMut(Line, &str)) -> Result<Skipped, ReadError> {
        let mut skipped = Skipped::default();
        for (nth, path) in self.files.iter().enumerate() {
            let end = self.end.filter(|_| nth + 1 == self.files.len()).unwrap_or(u64::MAX);
            let unreadable = |error| ReadError::Unreadable { path: path.clone(), error };
            let file = match File::open(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound && self.files.len() > 1 => continue,
                other => other.map_err(unreadable)?,
            };
            let mut reader = BufReader::new(file.take(end));
            let mut bytes = Vec::new();
            for number in 1.. {
                bytes.clear();
                if reader.read_until(b'\n', &mut bytes).map_err(unreadable)? == 0 {
                    break;
                }
                let text = String::from_utf8_lossy(&bytes);
                let text = text.trim_end();
                if text.is_empty() {
                    continue;
                }
                match parse(text) {
                    Ok(line) => take(line, text),
                    Err(reason) => {
                        skipped.lines += 1;
                        skipped.first.get_or_insert_with(|| format!("line {number} of {}: {reason}", path.display()));
                    }
                }
            }
        }
        Ok(skipped)
    }

    /// Leaves the oldest files out as long as the others have this many decisions.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub(crate) fn keep_newest(&mut self, decisions: usize) -> Result<(), ReadError> {
        let mut seen = 0;
        let mut first = self.files.len();
        while first > 0 && seen < decisions {
            first -= 1;
            let path = &self.files[first];
            let file = File::open(path).map_err(|error| ReadError::Unreadable { path: path.clone(), error })?;
            let lines = BufReader::new(file).split(b'\n');
            seen += lines.map_while(Result::ok).filter(|line| line.starts_with(br#"{"kind":"decision""#)).count();
        }
        self.files.drain(..first);
        Ok(())
    }

    /// What is written from now on; [`each`](Self::each) gives what is there by now.
    ///
    /// # Errors
    /// If the newest file cannot be read.
    pub(crate) fn follow(&mut self) -> Result<Tail, ReadError> {
        let path = self.files.last().cloned().unwrap_or_default();
        let at = whole_lines(&path).map_err(|error| ReadError::Unreadable { path: path.clone(), error })?;
        self.end = Some(at);
        Ok(Tail { path, at, begun: Vec::new() })
    }
}

/// Longest line that is looked for at the end of a file.
const MAX_LINE: u64 = 8 << 20;

/// Bytes of a file up to the end of its last whole line.
fn whole_lines(path: &Path) -> io::Result<u64> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    let from = length.saturating_sub(MAX_LINE);
    file.seek(SeekFrom::Start(from))?;
    let mut end = Vec::new();
    file.take(length - from).read_to_end(&mut end)?;
    Ok(end.iter().rposition(|&byte| byte == b'\n').map_or(from, |at| from + at as u64 + 1))
}

/// The end of receipts that are being written.
pub(crate) struct Tail {
    path: PathBuf,
    at: u64,
    /// A line that is not whole yet.
    begun: Vec<u8>,
}

impl Tail {
    /// Gives what was written since the last look to `take`; goes on to the next file when there is one.
    pub(crate) fn look(&mut self, mut take: impl FnMut(Line, &str)) {
        self.read(&mut take);
        let next = self.path.parent().and_then(|folder| {
            // By numbers: the present file may have been removed to make room, when much came between two looks.
            let present = number(&self.path)?;
            numbered(folder).ok()?.into_iter().find_map(|(number, path)| (number > present).then_some(path))
        });
        if let Some(next) = next {
            // What came to the old one between the two looks.
            self.read(&mut take);
            (self.path, self.at) = (next, 0);
            self.begun.clear();
            self.read(&mut take);
        }
    }

    fn read(&mut self, take: &mut impl FnMut(Line, &str)) {
        let mut bytes = Vec::new();
        let read = File::open(&self.path).and_then(|mut file| {
            file.seek(SeekFrom::Start(self.at))?;
            file.read_to_end(&mut bytes)
        });
        // Gone or not readable now: the next look tells.
        if read.is_err() {
            return;
        }
        self.at += bytes.len() as u64;
        self.begun.extend(bytes);
        while let Some(end) = self.begun.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.begun.drain(..=end).collect();
            let text = String::from_utf8_lossy(&line);
            if let Ok(line) = parse(text.trim_end()) {
                take(line, text.trim_end());
            }
        }
    }
}
