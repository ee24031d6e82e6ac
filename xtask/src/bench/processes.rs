//! Processes under measurement: started, watched in `/proc`, and ended by their handles.
//!
//! CPU time is that of a process, its threads and all its descendants. The kernel counts it twice: for a process, ended
//! threads included, in steps of 10 ms; for each living thread in nanoseconds. Neither can exceed the truth, so the larger
//! counts. Memory is the sum of the processes' peaks.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

use crate::{paths, run};

/// How long a contender may take to answer for the first time.
const START: Duration = Duration::from_secs(60);
/// How often it is asked meanwhile.
const POLL: Duration = Duration::from_millis(5);
/// How long a single question may take.
const ANSWER: Duration = Duration::from_secs(2);
/// The unit of CPU times in `/proc`: 1/100 s on all of Linux's platforms of today.
const TICK: Duration = Duration::from_millis(10);

/// A child and what it started. Dropping it ends them.
struct Tree(Child);

impl Drop for Tree {
    fn drop(&mut self) {
        let descendants = self.pids().unwrap_or_default();
        let _ = self.0.kill();
        let _ = self.0.wait();
        for pid in descendants.into_iter().filter(|&pid| pid != self.0.id()) {
            // They may have ended with their parent.
            run::works(Command::new("kill").args(["-KILL", &pid.to_string()]));
        }
    }
}

impl Tree {
    /// The child and all its descendants.
    fn pids(&self) -> Result<Vec<u32>> {
        let mut children: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for entry in fs::read_dir("/proc")? {
            let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            // It may end while we look.
            if let Some(parent) = stat(pid).and_then(|fields| fields.get(1)?.parse().ok()) {
                children.entry(parent).or_default().push(pid);
            }
        }
        let mut tree = vec![self.0.id()];
        let mut at = 0;
        while at < tree.len() {
            tree.extend(children.remove(&tree[at]).unwrap_or_default());
            at += 1;
        }
        Ok(tree)
    }
}

/// The fields of `/proc/PID/stat` behind the process's name: its state is the first.
fn stat(pid: u32) -> Option<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // A name may hold anything, parentheses included; nothing behind it does.
    Some(text.rsplit(')').next()?.split_whitespace().map(str::to_owned).collect())
}

/// A port that nobody listens on at this moment.
pub(super) fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).context("there is no free port")?.port())
}

/// A running contender.
pub(super) struct Router {
    tree: Tree,
    url: String,
    ready_after: Duration,
}

impl Router {
    /// Starts what listens on `port` and waits until a chat completion through it succeeds.
    pub(super) fn start(name: &str, port: u16, mut command: Command) -> Result<Self> {
        let log = log_file(name)?;
        let output = File::create(&log)?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let begun = Instant::now();
        let child = command.spawn().with_context(|| format!("cannot run {:?}", command.get_program()))?;
        let mut tree = Tree(child);
        loop {
            let last = match first_answer(port) {
                Ok(()) => break,
                Err(error) => error,
            };
            if let Some(status) = tree.0.try_wait()? {
                bail!("it ended with {status} before it answered: {}", tail(&log));
            }
            ensure!(begun.elapsed() < START, "no answer within {} s ({last:#}): {}", START.as_secs(), tail(&log));
            thread::sleep(POLL);
        }
        Ok(Self { tree, url: format!("http://127.0.0.1:{port}"), ready_after: begun.elapsed() })
    }

    pub(super) fn url(&self) -> &str {
        &self.url
    }

    /// From its start to its first chat completion.
    pub(super) fn ready_after(&self) -> Duration {
        self.ready_after
    }

    /// User and system time so far.
    pub(super) fn cpu(&self) -> Result<Duration> {
        Ok(self.tree.pids()?.into_iter().map(|pid| in_steps(pid).unwrap_or_default().max(of_living_threads(pid))).sum())
    }

    /// The most memory that was resident, in bytes.
    pub(super) fn peak_rss(&self) -> Result<u64> {
        let peak = |pid| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
            line.trim().trim_end_matches(" kB").parse::<u64>().ok()
        };
        Ok(self.tree.pids()?.into_iter().filter_map(peak).sum::<u64>() * 1024)
    }
}

/// CPU time of a process, in the kernel's steps. None if it has ended.
fn in_steps(pid: u32) -> Option<Duration> {
    let fields = stat(pid)?;
    Some(TICK * (fields.get(11)?.parse::<u32>().ok()? + fields.get(12)?.parse::<u32>().ok()?))
}

/// CPU time of the threads that it has at this moment.
fn of_living_threads(pid: u32) -> Duration {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let time = |thread: fs::DirEntry| {
        let schedstat = fs::read_to_string(thread.path().join("schedstat")).ok()?;
        schedstat.split_whitespace().next()?.parse().ok().map(Duration::from_nanos)
    };
    threads.filter_map(time).sum()
}

/// Asks for a chat completion of one token.
fn first_answer(port: u16) -> Result<()> {
    let body = r#"{"model":"bench","messages":[{"role":"user","content":"ready?"}],"max_tokens":1}"#;
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(ANSWER))?;
    write!(
        stream,
        "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n\
         content-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    )?;
    let mut status = String::new();
    BufReader::new(stream.take(4096)).read_line(&mut status)?;
    ensure!(status.split_whitespace().nth(1) == Some("200"), "its answer was {:?}", status.trim());
    Ok(())
}

/// What is answered to a plain GET. By HTTP/1.0, so that it comes in one piece.
pub(super) fn get(port: u16, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(ANSWER))?;
    write!(stream, "GET {path} HTTP/1.0\r\nhost: 127.0.0.1:{port}\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").with_context(|| format!("no answer to {path}"))?;
    ensure!(head.split_whitespace().nth(1) == Some("200"), "the answer to {path} was {:?}", head.lines().next());
    Ok(body.to_owned())
}

fn log_file(name: &str) -> Result<PathBuf> {
    let directory = paths::target().join("bench/logs");
    fs::create_dir_all(&directory)?;
    Ok(directory.join(format!("{name}.log")))
}

/// The last lines of a log.
fn tail(log: &Path) -> String {
    let text = fs::read(log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let lines: Vec<&str> = text.lines().rev().take(3).collect();
    lines.into_iter().rev().collect::<Vec<_>>().join(" | ")
}

/// Fake engines of one pace.
pub(super) struct Engines {
    trees: Vec<Tree>,
    urls: Vec<String>,
}

impl Engines {
    pub(super) fn start(program: &Path, count: u64, pace_ms: u64) -> Result<Self> {
        let mut engines = Self { trees: Vec::new(), urls: Vec::new() };
        for _ in 0..count {
            let mut command = Command::new(program);
            command.args(["--pace-ms", &pace_ms.to_string()]).stdin(Stdio::null()).stdout(Stdio::piped());
            let mut child = command.spawn().with_context(|| format!("cannot run {}", program.display()))?;
            let output = child.stdout.take().context("the engine has no output")?;
            engines.trees.push(Tree(child));
            // It prints its URL or ends.
            let mut line = String::new();
            BufReader::new(output).read_line(&mut line)?;
            engines.urls.push(line.split_whitespace().last().context("the engine did not start")?.to_owned());
        }
        Ok(engines)
    }

    pub(super) fn urls(&self) -> &[String] {
        &self.urls
    }
}
