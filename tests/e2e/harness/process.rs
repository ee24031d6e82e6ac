//! Programs under test, as child processes with their output collected.

use std::{
    io::{BufRead, BufReader, Read},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread::{self, JoinHandle},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};

use super::{PATIENCE, eventually, eventually_within};

/// The binary under test.
pub(crate) const BINARY: &str = env!("CARGO_BIN_EXE_dynamo-host");

/// A running program. It is killed when dropped; what it said is shown when the test fails.
pub(crate) struct Process {
    name: String,
    child: Child,
    stdout: Output,
    stderr: Output,
}

/// What a program that ran to its end left.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Process {
    /// Starts a program.
    pub(crate) fn start(name: impl Into<String>, command: &mut Command) -> Self {
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = child.unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
        let stdout = Output::of(child.stdout.take().unwrap());
        let stderr = Output::of(child.stderr.take().unwrap());
        Self { name: name.into(), child, stdout, stderr }
    }

    /// The URL at the end of the line of its stdout that begins so.
    pub(crate) async fn listener(&mut self, begins: &str) -> String {
        let what = format!("{} prints a line that begins with {begins:?}", self.name);
        eventually(&what, async || {
            // Looked at before its output: what it wrote before it ended is then there.
            let ended = self.child.try_wait().unwrap();
            let text = self.stdout.text();
            let line = text.split_inclusive('\n').find(|line| line.starts_with(begins) && line.ends_with('\n'));
            assert!(line.is_some() || ended.is_none(), "{} ended with {} before: {what}", self.name, ended.unwrap());
            line.map(|line| line.split_whitespace().last().unwrap().to_owned())
        })
        .await
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// The most memory that it has had, in bytes.
    pub(crate) fn peak_memory(&self) -> u64 {
        self.status_bytes("VmHWM:")
    }

    /// The memory that it has now, in bytes.
    pub(crate) fn memory(&self) -> u64 {
        self.status_bytes("VmRSS:")
    }

    fn status_bytes(&self, key: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.id())).unwrap();
        let value = status.lines().find_map(|line| line.strip_prefix(key)?.strip_suffix("kB"));
        value.unwrap_or_else(|| panic!("no {key} in {status}")).trim().parse::<u64>().unwrap() * 1024
    }

    /// What it wrote to stderr so far.
    pub(crate) fn log(&self) -> String {
        self.stderr.text()
    }

    /// Whether a thread of it panicked; a guest's panic, which is only told, does not count.
    pub(crate) fn panicked(&self) -> bool {
        self.log().lines().any(|line| line.starts_with("thread '"))
    }

    /// Waits until its log says something.
    pub(crate) async fn logs(&self, part: &str) {
        eventually(&format!("{} logs {part:?}", self.name), async || self.log().contains(part).then_some(())).await;
    }

    /// Kills it as the system does when memory is short: at once, with no chance to tidy up.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Sends it a signal by its name, such as `STOP`.
    pub(crate) fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([format!("-{name}"), self.id().to_string()]).status().unwrap();
        assert!(sent.success(), "kill -{name} {}: {sent}", self.id());
    }

    /// Asks it to stop.
    pub(crate) fn terminate(&self) {
        let id = Pid::from_raw(self.id().try_into().unwrap()).unwrap();
        kill_process(id, Signal::TERM).unwrap();
    }

    /// Waits until it has ended by itself.
    pub(crate) async fn ended(&mut self) -> ExitStatus {
        let what = format!("{} ends", self.name);
        eventually(&what, async || self.child.try_wait().unwrap()).await
    }

    /// Waits until it has ended, and for the last of its output.
    pub(crate) async fn finished(self) -> Finished {
        self.finished_within(PATIENCE).await
    }

    /// The same for a program that takes long.
    pub(crate) async fn finished_within(mut self, patience: Duration) -> Finished {
        let what = format!("{} ends", self.name);
        let code = eventually_within(patience, &what, async || self.child.try_wait().unwrap()).await.code();
        Finished { code, stdout: self.stdout.whole(), stderr: self.stderr.whole() }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            let Self { name, stdout, stderr, .. } = self;
            eprintln!("---- {name}, stdout\n{}---- {name}, stderr\n{}----", stdout.whole(), stderr.whole());
        }
    }
}

/// `dynamo-host` with these arguments and no settings from the environment of whoever runs the tests.
pub(crate) fn dynamo_host(arguments: &[&str]) -> Command {
    let mut command = Command::new(BINARY);
    command.args(arguments).env_remove("RUST_LOG");
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("DYNAMO_")) {
        command.env_remove(name);
    }
    command
}

/// `dynamo-host serve` on free ports over one mock engine, with more arguments.
pub(crate) fn serve<'a>(more: &[&'a str]) -> Vec<&'a str> {
    let serve = ["serve", "--http", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--worker", "mock://a?model=m&speedup=50"];
    [&serve, more].concat()
}

/// Runs `dynamo-host` to its end.
pub(crate) async fn run(arguments: &[&str]) -> Finished {
    Process::start(format!("dynamo-host {}", arguments.join(" ")), &mut dynamo_host(arguments)).finished().await
}

impl Finished {
    /// Its stdout, if it succeeded.
    #[track_caller]
    pub(crate) fn succeeded(&self) -> &str {
        assert_eq!(self.code, Some(0), "it failed: {}{}", self.stdout, self.stderr);
        &self.stdout
    }

    /// Checks that it failed with `code`, and that its message has all these parts.
    #[track_caller]
    pub(crate) fn failed(&self, code: i32, says: &[&str]) {
        assert_eq!(self.code, Some(code), "exit code, with: {}{}", self.stdout, self.stderr);
        for part in says {
            assert!(self.stderr.contains(part), "it should say {part:?}: {}", self.stderr);
        }
        assert!(!self.stderr.contains("panicked"), "a panic is no error message: {}", self.stderr);
    }
}

/// One of a program's outputs, read by a thread as it comes, so that the program never waits for a reader.
struct Output {
    text: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
}

impl Output {
    fn of(pipe: impl Read + Send + 'static) -> Self {
        let text: Arc<Mutex<String>> = Arc::default();
        let collected = Arc::clone(&text);
        let reader = thread::spawn(move || {
            let mut pipe = BufReader::new(pipe);
            let mut line = Vec::new();
            while pipe.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
                collected.lock().unwrap_or_else(PoisonError::into_inner).push_str(&String::from_utf8_lossy(&line));
                line.clear();
            }
        });
        Self { text, reader: Some(reader) }
    }

    fn text(&self) -> String {
        self.text.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// All of it: the program has ended, so that the pipe does.
    fn whole(&mut self) -> String {
        if let Some(reader) = self.reader.take() {
            // A reader only panics if memory is out.
            let _ = reader.join();
        }
        self.text()
    }
}
