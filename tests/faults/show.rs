//! The show: engines killed, or stopped, at random under streams; nothing is lost.
//!
//! At length it is what the project promises: four engines, 64 clients, 60 tokens at 20 ms each, for a minute, a random
//! engine killed every 2 s and started again 1 s later, or stopped every 5 s for 3 s.

use std::{
    env,
    time::{Duration, Instant},
};

use tokio::time::sleep_until;

use crate::{
    engines::{Dice, Engines, STEADY},
    footprint::Footprint,
    harness::host::Host,
    load::{self, Ask, Expected, Report, percentile},
};

const ENGINES: usize = 4;
pub(crate) const TOKENS: u32 = 60;

/// What is done to engines.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Deed {
    /// Killed and started again.
    Kill,
    /// Stopped and continued.
    Freeze,
}

/// How long and hard.
pub(crate) struct Length {
    pub(crate) clients: usize,
    pub(crate) lasts: Duration,
    pub(crate) every: Duration,
    pub(crate) back_after: Duration,
}

/// How long it lasts at length; `None`: in short.
pub(crate) fn lasts() -> Option<Duration> {
    let seconds = env::var("DYNAMO_HOST_TEST_FAULTS_SHOW_S").ok()?;
    Some(Duration::from_secs(seconds.parse().expect("seconds")))
}

impl Deed {
    fn length(self) -> Length {
        let ms = Duration::from_millis;
        match (lasts(), self) {
            (Some(lasts), Self::Kill) => Length { clients: 64, lasts, every: ms(2000), back_after: ms(1000) },
            (Some(lasts), Self::Freeze) => Length { clients: 64, lasts, every: ms(5000), back_after: ms(3000) },
            (None, Self::Kill) => Length { clients: 24, lasts: ms(4000), every: ms(1000), back_after: ms(500) },
            (None, Self::Freeze) => Length { clients: 24, lasts: ms(3000), every: ms(2000), back_after: ms(1500) },
        }
    }
}

/// The seed of all that is random; printed, so that a run can be had again.
pub(crate) fn seed() -> u64 {
    env::var("DYNAMO_HOST_TEST_FAULTS_SEED").map_or(1, |seed| seed.parse().expect("the seed is a number"))
}

/// Does it to one engine after the other, at random, while clients ask. Returns what they got, and what was done to whom.
#[expect(clippy::print_stdout, reason = "figures are for whoever runs it with --nocapture")]
pub(crate) async fn nothing_is_lost(
    engines: &mut Engines,
    host: &Host,
    deed: Deed,
    length: Length,
    asks: &[Ask],
) -> (Report, Vec<usize>) {
    let Length { clients, lasts, every, back_after } = length;
    let expected = Expected::of(engines.http(0), TOKENS).await;
    let before = Footprint::of(host).await;
    let begun = Instant::now();
    let until = begun + lasts;
    let mut dice = Dice(seed());
    let mut faults = Vec::new();
    let doing = async {
        let mut next = begun + every;
        while next < until {
            sleep_until(next.into()).await;
            let at = dice.below(engines.count());
            faults.push((Instant::now(), at));
            match deed {
                Deed::Kill => engines.kill(at),
                Deed::Freeze => engines.freeze(at),
            }
            sleep_until((next + back_after).into()).await;
            match deed {
                Deed::Kill => engines.restart(at).await,
                Deed::Freeze => engines.thaw(at),
            }
            next += every;
        }
    };
    let (report, ()) = tokio::join!(load::run(&host.http, asks, clients, &expected, until), doing);
    let (named, struck): (Vec<_>, _) = faults.into_iter().map(|(when, at)| ((when, format!("e{at}")), at)).unzip();
    let pauses = report.pauses(&named);
    println!(
        "{deed:?} {asks:?}: {} requests by {clients} clients in {:.0} s, {} faults, {} bad; seams seen {}, pause p50 {} p99 {} (seed {})",
        report.requests.len(),
        begun.elapsed().as_secs_f64(),
        named.len(),
        report.bad().len(),
        pauses.len(),
        percentile(&pauses, 50),
        percentile(&pauses, 99),
        seed(),
    );
    report.is_good(&format!("{deed:?} (seed {})", seed()));
    assert!(!host.process.panicked(), "it panicked");
    let after = Footprint::settled(host, before).await;
    println!("  before: {before}\n  after:  {after}");
    (report, struck)
}

async fn show(deed: Deed) {
    let asks: Vec<&[Ask]> = if lasts().is_some() {
        vec![
            &[Ask::ChatStream],
            &[Ask::ChatWhole],
            &[Ask::ChatStreamOfTwo, Ask::ChatWholeOfTwo],
            &[Ask::CompletionStream, Ask::CompletionWhole],
        ]
    } else {
        vec![&Ask::ALL]
    };
    for asks in asks {
        let mut engines = Engines::start(ENGINES, &STEADY).await;
        let host = engines.host("").await;
        nothing_is_lost(&mut engines, &host, deed, deed.length(), asks).await;
    }
}

#[tokio::test]
async fn no_token_is_lost_while_engines_are_killed() {
    show(Deed::Kill).await;
}

#[tokio::test]
async fn no_token_is_lost_while_engines_are_stopped() {
    show(Deed::Freeze).await;
}
