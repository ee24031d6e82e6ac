//! The prefill leg of a concurrent hand-off, beside the decode leg, whose answer is the answer.
//!
//! Contract: what the prefill worker answers is read to its end and told to nobody, unless it is a no. As long as the decode worker
//! has not answered, a leg that fails ends the other one: each would wait for the other in vain.

use std::{
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use dynamo_engine_api::{Engine, EngineError, GenerateRequest, WholeReply};
use dynamo_host_core::Worker;
use futures_util::{FutureExt, StreamExt, future::BoxFuture};
use tokio::{
    task::AbortHandle,
    time::{timeout, timeout_at},
};

use super::usage_of;
use crate::{
    account::Account,
    dispatch::{Opened, open},
    migrate::Vigil,
    relay::Patience,
    tasks,
};

/// How long a prefill worker's answer may go on when the decode worker's is there as a whole.
const TAIL: Duration = Duration::from_secs(5);

/// What works beside an answer. Dropped, it ends.
pub(crate) struct Beside(AbortHandle);

impl Drop for Beside {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The prefill leg.
pub(crate) struct PrefillLeg {
    pub(crate) engine: Arc<dyn Engine>,
    pub(crate) ask: GenerateRequest,
    pub(crate) worker: Worker,
    pub(crate) patience: Patience,
    pub(crate) vigil: Vigil,
    pub(crate) account: Account,
}

/// How it ended.
enum Ended {
    Well,
    Not(Box<Unprefilled>),
}

/// How a prefill leg came to nothing.
pub(crate) enum Unprefilled {
    Answered(Account, WholeReply),
    Failed(Account, EngineError),
}

/// What came first of both legs.
pub(crate) enum Abreast<T> {
    /// What the decode leg came to, well or not.
    Decode(T, Tail),
    /// The prefill leg failed before.
    Unprefilled(Box<Unprefilled>),
}

/// What is left of a prefill leg. Dropped, it ends.
pub(crate) struct Tail(Option<BoxFuture<'static, Ended>>);

impl Tail {
    /// Lets it go on beside a stream, until then at most. `None`: it is done.
    pub(crate) fn beside(self, deadline: Instant) -> Option<Beside> {
        let leg = self.0?;
        Some(Beside(tasks::spawn("prefill leg", async move { drop(timeout_at(deadline.into(), leg).await) })))
    }

    /// Hears it out after a whole answer.
    pub(super) fn hear_out(self) {
        if let Some(leg) = self.0 {
            tasks::spawn("prefill leg", async move { drop(timeout(TAIL, leg).await) });
        }
    }
}

/// Sends a prefill leg out together with a decode leg, until that has answered or failed.
pub(crate) async fn abreast<T>(leg: PrefillLeg, decode: impl Future<Output = T>) -> Abreast<T> {
    let mut leg = Some(leg.run().boxed());
    let mut decode = pin!(decode);
    loop {
        let Some(running) = &mut leg else { return Abreast::Decode(decode.await, Tail(None)) };
        tokio::select! {
            biased;
            came = &mut decode => return Abreast::Decode(came, Tail(leg)),
            ended = running => match ended {
                Ended::Well => leg = None,
                Ended::Not(unprefilled) => return Abreast::Unprefilled(unprefilled),
            },
        }
    }
}

impl PrefillLeg {
    async fn run(self) -> Ended {
        let Self { engine, ask, worker, patience, mut vigil, account } = self;
        let mut chunks = match open(&*engine, ask, &worker, &patience, &mut vigil, &|| true).await {
            Ok(Opened::Whole(reply)) if reply.status.is_success() => {
                account.prefilled(usage_of(&reply));
                return Ended::Well;
            }
            Ok(Opened::Whole(reply)) => return Ended::Not(Box::new(Unprefilled::Answered(account, reply))),
            Ok(Opened::Stream(_, chunks)) => chunks,
            Err(error) => return Ended::Not(Box::new(Unprefilled::Failed(account, error))),
        };
        account.prefilled(None);
        // What it says of its output nobody needs: it is the other one's.
        while let Some(Ok(_)) = chunks.next().await {}
        Ended::Well
    }
}
