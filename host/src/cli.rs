//! The command line: what can be typed, and which exit code comes of it.
//!
//! 0: done. 1: the command failed, with one message on stderr. 2: it could not begin: flags, configuration, addresses.
//! 130, 143: a second SIGINT or SIGTERM cut a host's stop short.

mod admin;
mod assets;
mod audit;
mod config;
mod dashboard;
mod key;
mod mock;
mod policy;
mod profile;
mod receipts;
mod simulate;
mod worker;

use std::{fmt::Display, net::SocketAddr, path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand, ValueEnum};
use dynamo_host_core::OnError;

use crate::{
    config::{Config, ServeFlags},
    serve,
};

/// Many LLM engines as one service, with its decisions in WebAssembly.
#[derive(Parser)]
#[command(name = "dynamo-host", version, propagate_version = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve: a front door over workers, routed by a policy
    Serve(Box<ServeFlags>),
    /// Write, build, check, measure, activate, list and roll back policies
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// What was decided, why, and what became of it
    #[command(subcommand)]
    Receipts(receipts::ReceiptsCommand),
    /// API keys of the front door
    #[command(subcommand)]
    Key(KeyCommand),
    /// List workers, drain them, and put them back to work
    #[command(subcommand)]
    Worker(WorkerCommand),
    /// What was changed in a running host, when and by whom: policies, kill switches, drained workers
    Audit {
        /// How many changes, the newest last
        #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=10_000))]
        last: u32,
        #[command(flatten)]
        admin: AdminFlags,
        #[command(flatten)]
        output: OutputFlags,
    },
    /// Check a configuration file without serving
    #[command(subcommand)]
    Config(ConfigCommand),
    /// What a running host is doing
    Status {
        #[command(flatten)]
        admin: AdminFlags,
        #[command(flatten)]
        output: OutputFlags,
    },
    /// Replay a trace in virtual time, and see policies side by side before they touch traffic
    Simulate(Box<simulate::SimulateFlags>),
    /// Measure a live engine and write its profile, for policies, simulations and planning
    Profile(profile::ProfileFlags),
    /// An engine without a GPU: vLLM's endpoints over a model of an engine
    MockEngine(MockFlags),
    /// Write what a release carries: man pages, completions, a dashboard
    #[command(hide = true)]
    Assets {
        /// Where to
        directory: PathBuf,
    },
}

#[derive(Subcommand)]
enum PolicyCommand {
    /// Make a component decide in a slot of a running host, from the next request on
    Activate {
        /// Where it decides: routing or admission
        slot: String,
        /// The component, or `native` for the built-in fallback
        file: String,
        /// Its settings: JSON, or @FILE
        #[arg(long, value_name = "JSON|@FILE")]
        settings: Option<String>,
        #[command(flatten)]
        admin: AdminFlags,
        #[command(flatten)]
        output: OutputFlags,
    },
    /// Go back to what decided before
    Rollback {
        /// Where: routing or admission
        slot: String,
        #[command(flatten)]
        admin: AdminFlags,
        #[command(flatten)]
        output: OutputFlags,
    },
    /// The kill switch: the native fallback decides, from the next decision on, whatever is active
    Bypass {
        /// Where: routing or admission
        slot: String,
        /// Let the policy decide again
        #[arg(long)]
        off: bool,
        #[command(flatten)]
        admin: AdminFlags,
        #[command(flatten)]
        output: OutputFlags,
    },
    /// What happens to requests that the policy fails to decide
    OnError {
        /// Where: routing or admission
        slot: String,
        /// fallback, or open: the native fallback decides; last-good: the newest earlier version that is sound; closed: refused, with 503
        mode: OnError,
        #[command(flatten)]
        admin: AdminFlags,
        #[command(flatten)]
        output: OutputFlags,
    },
    /// Slots, their policies, and what went wrong with them
    List {
        #[command(flatten)]
        admin: AdminFlags,
        #[command(flatten)]
        output: OutputFlags,
    },
    /// Write the crate of a new policy: it builds, and passes its own tests
    New {
        /// Its name, such as my-policy
        name: String,
        /// What it decides
        #[arg(long, value_name = "WORLD", default_value = "router")]
        world: policy::World,
        /// The folder to make [default: the name, in this folder]
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
        /// Use the SDK in this folder instead of writing one beside the crate
        #[arg(long, value_name = "DIR")]
        sdk: Option<PathBuf>,
    },
    /// Build a crate's component with cargo, and check it
    Build {
        /// The crate
        #[arg(value_name = "DIR", default_value = ".")]
        directory: PathBuf,
        /// Where to write the component [default: NAME.wasm in the crate's folder]
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
        #[command(flatten)]
        output: OutputFlags,
        /// For cargo
        #[arg(last = true, value_name = "CARGO ARGUMENTS")]
        more: Vec<String>,
    },
    /// Say what a component is and what it reads, without running it
    Inspect {
        /// The component
        file: PathBuf,
        #[command(flatten)]
        output: OutputFlags,
    },
    /// Load a component as a host would, without a host, ask it made-up requests, and say what is or may become wrong
    Check {
        /// The component
        file: PathBuf,
        /// Its settings: JSON, or @FILE
        #[arg(long, value_name = "JSON|@FILE")]
        settings: Option<String>,
        #[command(flatten)]
        output: OutputFlags,
    },
    /// Have a component decide again what receipts tell of, and say where it would have decided otherwise
    Replay(policy::ReplayFlags),
    /// Measure a component's decisions, beside the native fallback's
    Bench {
        /// The component
        file: PathBuf,
        /// Its settings: JSON, or @FILE
        #[arg(long, value_name = "JSON|@FILE")]
        settings: Option<String>,
        /// Numbers of candidates
        #[arg(long, value_delimiter = ',', value_name = "N,…", default_values_t = [4, 64, 1024, 10_000],
            value_parser = clap::value_parser!(u32).range(1..=100_000))]
        candidates: Vec<u32>,
        /// Times to measure each; the median counts
        #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
        rounds: u32,
        #[command(flatten)]
        output: OutputFlags,
    },
}

#[derive(Subcommand)]
enum KeyCommand {
    /// Make a key: itself on stderr, this once, and on stdout the lines that let it in, to be added to the keys file
    New(NewKeyFlags),
}

#[derive(clap::Args)]
struct NewKeyFlags {
    /// Whose key it is; policies see it
    tenant: String,
    /// Priority of its requests: higher is sooner
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    priority: Option<i32>,
    /// Class of its requests in the queue
    #[arg(long, value_name = "NAME")]
    class: Option<String>,
    /// A model that it may use, or its name's beginning and a *; may be repeated; without any, all
    #[arg(long = "model", value_name = "NAME")]
    models: Vec<String>,
    /// When it ends: a date, or a time such as 2027-01-31T18:00:00Z
    #[arg(long, value_name = "DATE")]
    expires: Option<toml::value::Datetime>,
}

#[derive(Subcommand)]
enum WorkerCommand {
    /// Workers of a running host, where they come from, what they do and what is wrong with them
    List {
        /// The ways that KV has gone between them as well, how fast, and which are left alone
        #[arg(long)]
        links: bool,
        #[command(flatten)]
        admin: AdminFlags,
        #[command(flatten)]
        output: OutputFlags,
    },
    /// Give a worker no new requests; it finishes those that it has
    Drain {
        /// Its name
        name: String,
        /// Wait until it has finished them, at most so many seconds
        #[arg(long, value_name = "SECONDS")]
        wait: Option<u64>,
        /// After so many seconds, what it still has is continued by others [default: health.drain_grace_s]
        #[arg(long, value_name = "SECONDS")]
        grace: Option<u64>,
        #[command(flatten)]
        admin: AdminFlags,
        #[command(flatten)]
        output: OutputFlags,
    },
    /// Give a drained worker new requests again
    Resume {
        /// Its name
        name: String,
        #[command(flatten)]
        admin: AdminFlags,
        #[command(flatten)]
        output: OutputFlags,
    },
}

#[derive(Subcommand)]
enum ConfigCommand {
    /// Say whether a configuration file can be run, and what would run
    Check {
        /// The file
        file: PathBuf,
        #[command(flatten)]
        output: OutputFlags,
    },
}

#[derive(clap::Args)]
struct AdminFlags {
    /// URL of the host's admin API
    #[arg(long, value_name = "URL", env = "DYNAMO_HOST_ADMIN", default_value = "http://127.0.0.1:8081")]
    admin: String,
    /// Its token, if it demands one
    #[arg(long, value_name = "TOKEN", env = "DYNAMO_HOST_ADMIN_TOKEN", hide_env_values = true)]
    token: Option<String>,
    /// Certificates to trust if it speaks TLS (PEM) [default: those of the system]
    #[arg(long, value_name = "FILE", env = "DYNAMO_HOST_ADMIN_CA")]
    admin_ca: Option<PathBuf>,
    /// Certificate to show to it (PEM)
    #[arg(long, value_name = "FILE", env = "DYNAMO_HOST_ADMIN_CERT", requires = "admin_key")]
    admin_cert: Option<PathBuf>,
    /// Key of that certificate (PEM)
    #[arg(long, value_name = "FILE", env = "DYNAMO_HOST_ADMIN_KEY", requires = "admin_cert")]
    admin_key: Option<PathBuf>,
}

#[derive(clap::Args, Clone, Copy)]
struct OutputFlags {
    /// How to print the result
    #[arg(long, default_value = "text")]
    output: Output,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people.
    Text,
    /// For tools.
    Json,
}

#[derive(clap::Args)]
struct MockFlags {
    /// Address to listen on, port 0 for any free one
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8000")]
    http: SocketAddr,
    /// Name of the model that it serves
    #[arg(long, value_name = "NAME", default_value = "mock")]
    model: String,
    /// A property of the engine, such as speedup=10 or kv_blocks=4096; may be repeated
    #[arg(long = "profile", value_name = "KEY=VALUE")]
    profile: Vec<String>,
    /// What it does wrong, such as die=20 or refuse=busy; may be repeated. While it runs: POST /mock/faults
    #[arg(long = "fault", value_name = "KEY=VALUE")]
    fault: Vec<String>,
}

/// Runs what the command line says.
#[must_use]
pub fn main() -> ExitCode {
    match Arguments::parse().command {
        Command::Serve(flags) => match Config::resolve(*flags) {
            Ok(config) => match run(true, serve::run(config)) {
                Ok(code) => ExitCode::from(code),
                Err(error) => exit(2, Err(error)),
            },
            Err(error) => exit(2, Err(error)),
        },
        Command::Simulate(flags) => exit(1, simulate::run(&flags)),
        Command::Profile(flags) => exit(1, run(false, profile::run(flags))),
        Command::MockEngine(flags) => exit(2, run(true, mock::run(flags))),
        Command::Key(KeyCommand::New(flags)) => exit(1, key::new(&flags)),
        Command::Assets { directory } => exit(1, assets::write(&directory)),
        Command::Audit { last, admin, output } => exit(1, run(false, audit::list(last, &admin, output.output))),
        Command::Status { admin, output } => exit(1, run(false, admin::status(&admin, output.output))),
        Command::Worker(command) => match command {
            WorkerCommand::List { links, admin, output } => exit(1, run(false, worker::list(links, &admin, output.output))),
            WorkerCommand::Drain { name, wait, grace, admin, output } => {
                exit(1, run(false, worker::drain(&name, wait, grace, &admin, output.output)))
            }
            WorkerCommand::Resume { name, admin, output } => exit(1, run(false, worker::resume(&name, &admin, output.output))),
        },
        Command::Receipts(command) => exit(1, receipts::run(&command)),
        Command::Config(ConfigCommand::Check { file, output }) => exit(1, config::check(&file, output.output)),
        Command::Policy(command) => match command {
            PolicyCommand::Activate { slot, file, settings, admin, output } => {
                exit(1, run(false, admin::activate(&slot, &file, settings.as_deref(), &admin, output.output)))
            }
            PolicyCommand::Rollback { slot, admin, output } => exit(1, run(false, admin::rollback(&slot, &admin, output.output))),
            PolicyCommand::Bypass { slot, off, admin, output } => {
                exit(1, run(false, admin::bypass(&slot, !off, &admin, output.output)))
            }
            PolicyCommand::OnError { slot, mode, admin, output } => {
                exit(1, run(false, admin::on_error(&slot, mode, &admin, output.output)))
            }
            PolicyCommand::List { admin, output } => exit(1, run(false, admin::list(&admin, output.output))),
            PolicyCommand::New { name, world, dir, sdk } => exit(1, policy::create(&name, world, dir.as_deref(), sdk.as_deref())),
            PolicyCommand::Build { directory, out, output, more } => {
                exit(1, policy::build(&directory, out.as_deref(), &more, output.output))
            }
            PolicyCommand::Inspect { file, output } => exit(1, policy::inspect(&file, output.output)),
            PolicyCommand::Check { file, settings, output } => exit(1, policy::check(&file, settings.as_deref(), output.output)),
            PolicyCommand::Replay(flags) => exit(1, policy::replay(&flags)),
            PolicyCommand::Bench { file, settings, candidates, rounds, output } => {
                exit(1, policy::bench(&file, settings.as_deref(), &candidates, rounds, output.output))
            }
        },
    }
}

#[expect(clippy::print_stderr, reason = "a command's error is for the person at the terminal")]
fn exit<E: Display>(code: u8, result: Result<(), E>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(code)
        }
    }
}

/// Runs asynchronous work: a server on all cores, a client on this thread.
fn run<T, E>(is_server: bool, work: impl Future<Output = Result<T, E>>) -> Result<T, String>
where
    E: Display,
{
    let mut builder =
        if is_server { tokio::runtime::Builder::new_multi_thread() } else { tokio::runtime::Builder::new_current_thread() };
    let runtime = builder.enable_all().build().map_err(|error| format!("the async runtime cannot start: {error}"))?;
    let result = runtime.block_on(work).map_err(|error| error.to_string());
    // What still runs after the drain has had its time.
    runtime.shutdown_background();
    result
}
