//! The soak: faults of all kinds at random, one engine at a time, and what the host holds over time.

use std::{
    env,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tokio::time::sleep;

use crate::{
    engines::{Dice, Engines, STEADY},
    footprint::Footprint,
    load::{self, Ask, Expected},
    show::seed,
};

const ENGINES: usize = 4;
const TOKENS: u32 = 40;
const CLIENTS: usize = 24;
/// How long the short form lasts.
const SHORT: Duration = Duration::from_secs(4);
/// How often the footprint is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(20);

/// What is done to an engine, for a while.
#[derive(Debug)]
enum Deed {
    Kill,
    Freeze,
    Fault(Value),
}

fn deed(dice: &mut Dice) -> Deed {
    let after = dice.below(TOKENS as usize + 1);
    match dice.below(12) {
        0 | 1 => Deed::Kill,
        2 => Deed::Freeze,
        3 => Deed::Fault(json!({ "cut": after, "share": 0.5 })),
        4 => Deed::Fault(json!({ "cut_character": after, "share": 0.5 })),
        5 => Deed::Fault(json!({ "error_event": after, "share": 0.5 })),
        6 => Deed::Fault(json!({ "end": after, "share": 0.5 })),
        7 => {
            let refusal = ["dead_core", "draining", "busy"][dice.below(3)];
            Deed::Fault(json!({ "refuse": refusal, "share": 0.5 }))
        }
        8 => Deed::Fault(json!({ "wedge": after })),
        9 => Deed::Fault(json!({ "slow": 5.0 })),
        10 => Deed::Fault(json!({ "unhealthy": true, "refuse": "dead_core" })),
        _ => Deed::Fault(json!({ "endless_headers": true, "next": 2 })),
    }
}

/// Does something to one engine for a while, then heals it.
async fn harm(engines: &mut Engines, dice: &mut Dice) {
    let (at, deed, lasts) = (dice.below(engines.count()), deed(dice), dice.between(300, 2500));
    match &deed {
        Deed::Kill => engines.kill(at),
        Deed::Freeze => engines.freeze(at),
        Deed::Fault(faults) => engines.faults(at, faults.clone()).await,
    }
    sleep(lasts).await;
    match deed {
        Deed::Kill => engines.restart(at).await,
        Deed::Freeze => engines.thaw(at),
        Deed::Fault(_) => engines.faults(at, json!({})).await,
    }
    assert!(engines.is_alive(at));
    sleep(dice.between(100, 600)).await;
}

#[tokio::test]
async fn nothing_is_lost_or_left_over_whatever_engines_do() {
    let told = env::var("DYNAMO_HOST_TEST_FAULTS_SOAK_S").ok();
    let lasts = told.map_or(SHORT, |seconds| Duration::from_secs(seconds.parse().expect("seconds")));
    let mut engines = Engines::start(ENGINES, &[&STEADY[..], &["script=wide"]].concat()).await;
    let host = engines.host("").await;
    let expected = Expected::of(engines.http(0), TOKENS).await;
    // What is made at first use is not leaked.
    load::run(&host.http, &Ask::ALL, CLIENTS, &expected, Instant::now()).await.is_good("before the soak");
    let before = Footprint::settled(&host, Footprint::of(&host).await).await;
    let begun = Instant::now();
    let until = begun + lasts;
    let (http, mut dice, mut harms) = (host.http.clone(), Dice(seed()), 0);
    let harming = async {
        while Instant::now() < until {
            harm(&mut engines, &mut dice).await;
            harms += 1;
        }
    };
    let looking = async {
        let mut next = begun + LOOK_EVERY;
        while next < until {
            tokio::time::sleep_until(next.into()).await;
            println!("{:>5} s: {}", begun.elapsed().as_secs(), Footprint::of(&host).await);
            next += LOOK_EVERY;
        }
    };
    let (report, (), ()) = tokio::join!(load::run(&http, &Ask::ALL, CLIENTS, &expected, until), harming, looking);
    let after = Footprint::settled(&host, before).await;
    println!("before: {before}\nafter:  {after}");
    println!(
        "soak of {:.0} s, seed {}: {} requests, {} good, {} bad, {harms} faults",
        begun.elapsed().as_secs_f64(),
        seed(),
        report.requests.len(),
        report.requests.len() - report.bad().len(),
        report.bad().len(),
    );
    report.is_good(&format!("a soak (seed {})", seed()));
    assert!(!host.process.panicked(), "it panicked");
}
