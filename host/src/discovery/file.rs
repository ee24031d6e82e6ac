//! Workers from a directory: one TOML file for each, with the keys of `[[worker]]`.
//!
//! The directory is looked at again and again, which works on every file system, also where files are links that are swapped
//! (Kubernetes' config maps). A file counts if its name ends in `.toml` and does not begin with a dot: editors' and tools'
//! temporary files do neither. A file that is broken leaves its worker as it last was, and one that is being written is given
//! a moment before it is called broken.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use super::{Found, Origin, Problem};
use crate::{
    config::{WorkerConfig, WrittenWorker},
    roster::{self, Roster},
    text::plain,
    watch::Stamp,
};

/// How often the directory is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(300);
/// For how long a file that has changed is read again at each look: a second write may not show in its time stamp, and what
/// is half written is not broken yet. One that is broken is read again for longer: a file that it names may be missing still.
const SETTLE: Duration = Duration::from_millis(500);
/// Largest file. A worker is a few lines.
const MAX_FILE_BYTES: u64 = 64 << 10;
/// Most files.
const MAX_FILES: usize = 100_000;

/// A directory of workers, as it was last seen.
pub(super) struct Directory {
    path: PathBuf,
    files: BTreeMap<String, Known>,
    /// What is wrong with the directory itself.
    trouble: Option<String>,
    has_looked: bool,
}

/// What is known of one file.
struct Known {
    stamp: Stamp,
    /// When it was first seen like this.
    since: Instant,
    /// It is read no more as long as it is like this.
    is_settled: bool,
    /// What it last said that was understood.
    worker: Option<WorkerConfig>,
    trouble: Option<String>,
}

impl Directory {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, files: BTreeMap::new(), trouble: None, has_looked: false }
    }

    /// Looks again and again, and tells the roster what has changed.
    pub(super) async fn watch(mut self, roster: &Arc<Roster>, origin: &Origin) {
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            self.bring(roster, origin).await;
        }
    }

    /// Looks once, and tells the roster if something has changed.
    pub(super) async fn bring(&mut self, roster: &Arc<Roster>, origin: &Origin) {
        let mut directory = std::mem::replace(self, Self::new(PathBuf::new()));
        let looked = tokio::task::spawn_blocking(move || {
            let found = directory.look(Instant::now());
            (directory, found)
        });
        // It fails only if looking panicked, which the task that waits here shall say.
        let (directory, found) = looked.await.expect("looking at a directory does not panic");
        *self = directory;
        if let Some(found) = found {
            roster.hear(origin, found).await;
        }
    }

    /// All that the directory says, if that is something new.
    fn look(&mut self, now: Instant) -> Option<Found> {
        let mut is_news = !std::mem::replace(&mut self.has_looked, true);
        match self.names() {
            // What was there stays: a file system that is away is no wish to serve nothing.
            Err(reason) => is_news |= complain(&mut self.trouble, &self.path, reason),
            Ok((names, trouble)) => {
                is_news |= match trouble {
                    Some(reason) => complain(&mut self.trouble, &self.path, reason),
                    None => self.trouble.take().is_some(),
                };
                let known = self.files.len();
                self.files.retain(|name, _| names.binary_search(name).is_ok());
                is_news |= self.files.len() < known;
                for name in names {
                    is_news |= self.look_at(name, now);
                }
            }
        }
        is_news.then(|| self.found())
    }

    /// Names of files that count, in order; and what is wrong with the directory as a whole.
    fn names(&self) -> Result<(Vec<String>, Option<String>), String> {
        let unreadable = |error: std::io::Error| format!("it cannot be read: {error}; its workers stay as they were");
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(unreadable)? {
            let name = entry.map_err(unreadable)?.file_name();
            names.extend(name.to_str().filter(|name| name.ends_with(".toml") && !name.starts_with('.')).map(str::to_owned));
        }
        names.sort_unstable();
        let trouble = (names.len() > MAX_FILES).then(|| {
            names.truncate(MAX_FILES);
            format!("it has more than {MAX_FILES} files; the rest are left out")
        });
        Ok((names, trouble))
    }

    /// Looks at one file; returns whether it says something new.
    fn look_at(&mut self, name: String, now: Instant) -> bool {
        let path = self.path.join(&name);
        // Gone since it was listed, or a link to nothing: the next look will tell.
        let Ok(metadata) = fs::metadata(&path) else { return false };
        if !metadata.is_file() {
            return false;
        }
        let stamp = Stamp::of(&metadata);
        let known =
            self.files.entry(name).or_insert_with(|| Known { stamp, since: now, is_settled: false, worker: None, trouble: None });
        if known.stamp != stamp {
            (known.stamp, known.since, known.is_settled) = (stamp, now, false);
        }
        if known.is_settled {
            return false;
        }
        let is_old = now.duration_since(known.since) >= SETTLE;
        match read(&path) {
            Ok(worker) => {
                known.is_settled = is_old;
                let is_news = known.worker.as_ref() != Some(&worker);
                known.worker = Some(worker);
                known.trouble.take().is_some() || is_news
            }
            Err(reason) if is_old => {
                let kept = if known.worker.is_some() { "; its worker stays as it was" } else { "" };
                complain(&mut known.trouble, &path, format!("{reason}{kept}"))
            }
            Err(_) => false,
        }
    }

    fn found(&self) -> Found {
        let mut found = Found::default();
        let mut names: HashMap<&str, &str> = HashMap::new();
        let problem = |place: &str, reason: String| Problem { place: place.to_owned(), reason };
        found.problems.extend(self.trouble.clone().map(|reason| problem(&self.path.display().to_string(), reason)));
        for (file, known) in &self.files {
            found.problems.extend(known.trouble.clone().map(|reason| problem(file, reason)));
            let Some(worker) = &known.worker else { continue };
            match names.insert(&worker.name, file) {
                None => found.workers.push(worker.clone()),
                Some(first) => {
                    names.insert(&worker.name, first);
                    let name = &worker.name;
                    found.problems.push(problem(file, format!("worker {name:?} is in {first} already; give it another name")));
                }
            }
        }
        found
    }
}

/// Takes down what is wrong, and says so in the log if it is new.
fn complain(trouble: &mut Option<String>, place: &Path, reason: String) -> bool {
    let reason = plain(&reason);
    if trouble.as_ref() == Some(&reason) {
        return false;
    }
    tracing::warn!("discovery: {}: {reason}", place.display());
    *trouble = Some(reason);
    true
}

/// Reads a worker's file.
fn read(path: &Path) -> Result<WorkerConfig, String> {
    let file = File::open(path).map_err(|error| format!("it cannot be read: {error}"))?;
    let mut text = String::new();
    file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text).map_err(|error| format!("it cannot be read: {error}"))?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(format!("it is larger than {MAX_FILE_BYTES} bytes"));
    }
    let written: WrittenWorker = toml::from_str(&text).map_err(|error| error.to_string())?;
    let worker = WorkerConfig::try_from(written)?;
    roster::check(&worker)?;
    Ok(worker)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory, what is known of it, and a clock that the test moves.
    struct Scene {
        folder: tempfile::TempDir,
        directory: Directory,
        now: Instant,
    }

    impl Scene {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let directory = Directory::new(folder.path().to_owned());
            Self { folder, directory, now: Instant::now() }
        }

        fn write(&self, name: &str, text: &str) {
            fs::write(self.folder.path().join(name), text).unwrap();
        }

        /// Looks after so much time: `name=url` of its workers, and where there is a problem; `None`: nothing is new.
        fn look(&mut self, after: Duration) -> Option<(Vec<String>, Vec<String>)> {
            self.now += after;
            let found = self.directory.look(self.now)?;
            let workers = found.workers.iter().map(|worker| format!("{}={}", worker.name, worker.url)).collect();
            Some((workers, found.problems.into_iter().map(|problem| format!("{}: {}", problem.place, problem.reason)).collect()))
        }

        #[track_caller]
        fn finds(&mut self, after: Duration, workers: &[&str]) -> Vec<String> {
            let (found, problems) = self.look(after).expect("something new");
            assert_eq!(found, workers);
            problems
        }
    }

    const AT_ONCE: Duration = Duration::ZERO;

    #[test]
    fn files_come_change_and_go() {
        let mut scene = Scene::new();
        assert!(scene.finds(AT_ONCE, &[]).is_empty(), "the first look tells that there is nothing");
        assert_eq!(scene.look(SETTLE), None);
        scene.write("a.toml", "url = 'http://h:1'\nname = 'a'");
        scene.write("b.toml", "url = 'http://h:2'\nname = 'b'");
        scene.finds(AT_ONCE, &["a=http://h:1", "b=http://h:2"]);
        assert_eq!(scene.look(AT_ONCE), None);
        // Of the same length, and perhaps within the same tick of the file system's clock.
        scene.write("a.toml", "url = 'http://h:3'\nname = 'a'");
        scene.finds(AT_ONCE, &["a=http://h:3", "b=http://h:2"]);
        fs::remove_file(scene.folder.path().join("b.toml")).unwrap();
        scene.finds(SETTLE, &["a=http://h:3"]);
        assert_eq!(scene.look(SETTLE), None);
    }

    #[test]
    fn a_broken_file_keeps_its_worker_and_is_told_once_when_it_has_settled() {
        let mut scene = Scene::new();
        scene.write("a.toml", "url = 'http://h:1'");
        scene.finds(AT_ONCE, &["h:1=http://h:1"]);
        scene.write("a.toml", "url = 'http://h:1'\ncolour = 'red'");
        assert_eq!(scene.look(AT_ONCE), None, "it may be half written");
        let problems = scene.finds(SETTLE, &["h:1=http://h:1"]);
        assert!(problems[0].starts_with("a.toml") && problems[0].contains("colour") && problems[0].contains("stays"));
        assert_eq!(scene.look(SETTLE), None);
        scene.write("a.toml", "url = 'http://h:4'");
        assert!(scene.finds(AT_ONCE, &["h:4=http://h:4"]).is_empty());
        scene.write("new.toml", "url = 'ftp://x'");
        assert_eq!(scene.look(AT_ONCE), None);
        let problems = scene.finds(SETTLE, &["h:4=http://h:4"]);
        assert!(problems[0].starts_with("new.toml") && problems[0].contains("http://"), "{problems:?}");
    }

    #[test]
    fn a_worker_comes_when_the_files_that_it_names_do() {
        let mut scene = Scene::new();
        let token = scene.folder.path().join("token");
        scene.write("a.toml", &format!("url = 'http://h:1'\nbearer_file = {token:?}"));
        assert!(scene.finds(AT_ONCE, &[]).is_empty());
        let problems = scene.finds(SETTLE, &[]);
        assert!(problems[0].starts_with("a.toml: bearer_file") && problems[0].contains("cannot be read"), "{problems:?}");
        assert_eq!(scene.look(10 * SETTLE), None, "it is told once");
        scene.write("token", "hush");
        assert!(scene.finds(SETTLE, &["h:1=http://h:1"]).is_empty());
        assert_eq!(scene.look(SETTLE), None);
    }

    #[test]
    fn a_renamed_file_is_read_and_temporary_ones_are_not() {
        let mut scene = Scene::new();
        for name in [".a.toml.swp", ".a.toml", "a.toml~", "a.toml.tmp", "README"] {
            scene.write(name, "not a worker");
        }
        fs::create_dir(scene.folder.path().join("folder.toml")).unwrap();
        scene.finds(AT_ONCE, &[]);
        assert_eq!(scene.look(SETTLE), None);
        scene.write("a.tmp", "url = 'http://h:1'");
        fs::rename(scene.folder.path().join("a.tmp"), scene.folder.path().join("a.toml")).unwrap();
        scene.finds(AT_ONCE, &["h:1=http://h:1"]);
        // Over one that is there, of the same length.
        scene.look(SETTLE);
        scene.write("a.tmp", "url = 'http://h:2'");
        fs::rename(scene.folder.path().join("a.tmp"), scene.folder.path().join("a.toml")).unwrap();
        scene.finds(AT_ONCE, &["h:2=http://h:2"]);
    }

    #[test]
    fn a_worker_that_is_there_twice_is_the_first_files() {
        let mut scene = Scene::new();
        scene.write("a.toml", "url = 'http://h:1'\nname = 'x'");
        scene.write("b.toml", "url = 'http://h:2'\nname = 'x'");
        let problems = scene.finds(AT_ONCE, &["x=http://h:1"]);
        assert!(problems[0].starts_with("b.toml") && problems[0].contains("is in a.toml already"), "{problems:?}");
    }

    #[test]
    fn a_file_that_is_too_large_is_refused_and_a_directory_that_is_away_changes_nothing() {
        let mut scene = Scene::new();
        scene.write("a.toml", "url = 'http://h:1'");
        scene.write("b.toml", &"#".repeat(MAX_FILE_BYTES as usize + 1));
        scene.finds(AT_ONCE, &["h:1=http://h:1"]);
        let problems = scene.finds(SETTLE, &["h:1=http://h:1"]);
        assert!(problems[0].contains("larger than 65536 bytes"), "{problems:?}");
        fs::rename(scene.folder.path(), scene.folder.path().with_extension("away")).unwrap();
        let problems = scene.finds(SETTLE, &["h:1=http://h:1"]);
        assert!(problems[0].contains("cannot be read") && problems[0].contains("stay as they were"), "{problems:?}");
        assert_eq!(scene.look(SETTLE), None);
        fs::rename(scene.folder.path().with_extension("away"), scene.folder.path()).unwrap();
        assert_eq!(scene.finds(SETTLE, &["h:1=http://h:1"]).len(), 1);
    }
}
