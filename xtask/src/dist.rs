//! `cargo xtask dist`: a release as one archive. `cargo xtask dashboard`: the committed dashboard, made anew.

use std::{fs, path::Path, process::Command};

use anyhow::{Context, Result, ensure};

use crate::{paths, policies, run, system};

/// Statically linked: one file that runs on any Linux.
const STATIC: &str = "x86_64-unknown-linux-musl";
/// Files of the repository that go along.
const FILES: &[&str] = &["LICENSE", "README.md", "CHANGELOG.md", "dist/Containerfile"];

/// Builds a release for `target`, by default the static one where it can be had and else this machine's own.
pub(crate) fn run(target: Option<&str>) -> Result<()> {
    policies::build()?;
    let target = match target {
        Some(target) => target.to_owned(),
        None if has_static() => STATIC.to_owned(),
        None => this_machine()?,
    };
    println!("Building the release for {target} (the first time takes 5 to 15 minutes)");
    if target == STATIC && !run::works(Command::new("musl-gcc").arg("--version")) {
        system::install(&["musl-tools"], "a static build, whose TLS has parts in C and assembler")?;
    }
    let features = ["--features", "dynamo-host/kubernetes"];
    run::check(
        run::cargo().args(["build", "--quiet", "--release", "--package", "dynamo-host", "--target", &target]).args(features),
    )?;
    let program = paths::target().join(&target).join("release/dynamo-host");

    let name = format!("dynamo-host-{}-{target}", env!("CARGO_PKG_VERSION"));
    let all = paths::target().join("dist");
    let staged = all.join(&name);
    if staged.exists() {
        fs::remove_dir_all(&staged)?;
    }
    fs::create_dir_all(staged.join("policies"))?;
    strip(&program, &staged.join("dynamo-host"))?;
    for policy in policies::POLICIES {
        let file = format!("{policy}.wasm");
        fs::copy(paths::policies().join(&file), staged.join("policies").join(&file))?;
    }
    run::check(Command::new(staged.join("dynamo-host")).arg("assets").arg(&staged))?;
    for file in FILES {
        let from = paths::root().join(file);
        let to = staged.join(from.file_name().context("a file has a name")?);
        fs::copy(&from, to).with_context(|| format!("{} cannot be copied", from.display()))?;
    }
    let archive = format!("{name}.tar.gz");
    pack(&all, &name, &archive)?;
    let sums = run::read(Command::new("sha256sum").arg(&archive).current_dir(&all))?;
    fs::write(all.join(format!("{archive}.sha256")), &sums)?;
    report(&staged, &all.join(&archive), &sums)
}

/// Writes `dist/grafana.json` from the metrics of this source.
pub(crate) fn dashboard() -> Result<()> {
    run::check(run::cargo().args(["build", "--quiet", "--workspace"]))?;
    let made = paths::target().join("assets");
    run::check(Command::new(paths::target().join("debug/dynamo-host")).arg("assets").arg(&made))?;
    let committed = paths::root().join("dist/grafana.json");
    fs::copy(made.join("grafana.json"), &committed)?;
    println!("{}", committed.display());
    Ok(())
}

fn has_static() -> bool {
    let installed =
        run::read(Command::new("rustc").args(["--print", "target-libdir", "--target", STATIC]).current_dir(paths::root()));
    cfg!(target_arch = "x86_64") && installed.is_ok_and(|path| Path::new(path.trim()).is_dir())
}

fn this_machine() -> Result<String> {
    let version = run::read(Command::new("rustc").arg("-vV"))?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc -vV names no host")?;
    Ok(host.to_owned())
}

/// Without debug information: it is ten times the program. Names of functions stay, for profiles and traces.
fn strip(from: &Path, to: &Path) -> Result<()> {
    run::check(Command::new("objcopy").arg("--strip-debug").args([from, to]))
}

/// The same files are the same archive: no names of users, no times of the build, in one order.
fn pack(all: &Path, name: &str, archive: &str) -> Result<()> {
    let time = run::read(Command::new("git").args(["log", "-1", "--format=%ct"]).current_dir(paths::root()));
    let time = time.map_or_else(|_| "0".to_owned(), |time| time.trim().to_owned());
    let mut tar = Command::new("tar");
    tar.current_dir(all).args(["--sort=name", "--owner=0", "--group=0", "--numeric-owner", "--format=gnu"]);
    tar.args([&format!("--mtime=@{time}"), "--use-compress-program=gzip -n -9", "-cf", archive, name]);
    run::check(&mut tar)
}

fn report(staged: &Path, archive: &Path, sums: &str) -> Result<()> {
    let kilobytes = |path: &Path| -> Result<u64> { Ok(fs::metadata(path)?.len() / 1000) };
    let program = staged.join("dynamo-host");
    println!("\n  {} ({} kB)", archive.display(), kilobytes(archive)?);
    println!("  sha256 {}", sums.split_whitespace().next().unwrap_or_default());
    println!("  dynamo-host ({} kB)", kilobytes(&program)?);
    for policy in policies::POLICIES {
        let file = format!("policies/{policy}.wasm");
        println!("  {file} ({} kB)", kilobytes(&staged.join(&file))?);
    }
    // `ldd` fails for a static program, and says so.
    let linked = Command::new("ldd").arg(&program).output().context("ldd cannot be run")?;
    let linked = String::from_utf8_lossy(&linked.stdout).trim().replace('\n', "\n  ");
    println!("  linked: {}", if linked.is_empty() { "statically" } else { &linked });
    let version = run::read(Command::new(&program).arg("--version"))?;
    ensure!(version.contains(env!("CARGO_PKG_VERSION")), "the program says that it is {version}");
    Ok(())
}
