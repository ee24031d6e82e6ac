//! The checks of what an engine tells of its load.

use std::time::Duration;

use tokio::time::{sleep, timeout};

use super::{
    Fixture, Verdict,
    ask::{Asking, ensure},
    checks::{Checked, applies},
};
use crate::{Endpoint, RankLoad};

/// How often load is looked at while a change is waited for. It is more work for an engine than a count.
const LOOK_EVERY: Duration = Duration::from_millis(20);
const UNTOLD: &str = "the engine does not tell its load";

pub(super) async fn it_tells_its_load<F: Fixture>(on: &Asking<'_, F>) -> Checked {
    applies(on.can.reports_load, UNTOLD)?;
    // An engine that counts its steps tells nothing before the first.
    on.whole(Endpoint::Completions, &on.completion("Work a little")).await?;
    let loads = load(on).await?;
    ensure(!loads.is_empty(), || "it has no ranks".into())?;
    ensure(loads.is_sorted_by(|one, next| one.rank < next.rank), || format!("its ranks are not in order: {loads:?}"))?;
    for rank in &loads {
        let fits = rank.kv_tokens_total.zip(rank.kv_tokens_free).is_none_or(|(total, free)| free <= total && total > 0);
        ensure(fits, || format!("more is free than there is: {rank:?}"))?;
        let speed = rank.tokens_per_second.is_none_or(|speed| speed.is_finite() && speed >= 0.0);
        ensure(speed, || format!("its speed is no speed: {rank:?}"))?;
    }
    Ok(())
}

pub(super) async fn a_stream_shows_in_its_load<F: Fixture>(on: &Asking<'_, F>) -> Checked {
    applies(on.can.reports_load, UNTOLD)?;
    let mut asked = on.completion("Go on and on");
    asked["max_tokens"] = on.fixture.long_output_tokens().into();
    let chunks = on.open(Endpoint::Completions, asked).await?;
    until(on, "with a stream", |running| running > 0).await?;
    drop(chunks);
    until(on, "after the stream", |running| running == 0).await
}

async fn load<F: Fixture>(on: &Asking<'_, F>) -> Result<Vec<RankLoad>, Verdict> {
    on.engine.load().await.map_err(|error| Verdict::Failed(error.to_string()))
}

/// Waits until the requests that the engine says it works on are as wanted.
async fn until<F: Fixture>(on: &Asking<'_, F>, when: &str, wanted: fn(u32) -> bool) -> Checked {
    let mut seen = Vec::new();
    let level = async {
        loop {
            seen = load(on).await?;
            if wanted(seen.iter().filter_map(|rank| rank.running).sum()) {
                return Ok(());
            }
            sleep(LOOK_EVERY).await;
        }
    };
    let reached = timeout(on.fixture.patience() / 2, level).await;
    reached.unwrap_or_else(|_| Err(Verdict::Failed(format!("{when} its load stays {seen:?}"))))
}
