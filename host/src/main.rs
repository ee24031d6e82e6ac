//! `dynamo-host`: see `dynamo-host --help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    dynamo_host::cli::main()
}
