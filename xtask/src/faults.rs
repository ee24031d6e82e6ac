//! Faults: runs `tests/faults` at length. Its short form is part of every test run.

use anyhow::Result;

use crate::{
    policies,
    run::{self, cargo},
};

/// How long each part of the show lasts, in seconds.
const SHOW_S: u64 = 60;

/// The soak for so many minutes; without them, the show: engines killed and stopped at random, for a minute each way,
/// and engines of both roles.
pub(crate) fn run(minutes: Option<u64>, seed: Option<u64>) -> Result<()> {
    policies::build()?;
    let mut command = cargo();
    // Of the whole workspace, as the tests build it: by itself the host would have other features, and be built twice.
    command.args(["test", "--workspace", "--test", "faults", "--", "--nocapture", "--test-threads=1"]);
    match minutes {
        Some(minutes) => command.arg("soak::").env("DYNAMO_HOST_TEST_FAULTS_SOAK_S", (minutes * 60).to_string()),
        None => command.args(["show::", "handoff::"]).env("DYNAMO_HOST_TEST_FAULTS_SHOW_S", SHOW_S.to_string()),
    };
    command.envs(seed.map(|seed| ("DYNAMO_HOST_TEST_FAULTS_SEED", seed.to_string())));
    run::check(&mut command)
}
