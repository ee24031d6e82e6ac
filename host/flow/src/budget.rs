//! Budget of retries: a share of what is asked, and a little more, so that failing workers are not asked ever more.
//!
//! Invariant: within any window, no more retries are granted than the share of the requests in it, and what each second has
//! of its own. Time that goes backwards grants nothing more.

/// Seconds over which a budget is reckoned.
pub const BUDGET_SECONDS: u64 = 10;

/// How much is granted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BudgetRules {
    /// Retries, as a share of requests.
    pub share: f32,
    /// Retries in a second whatever is asked.
    pub least_per_second: u32,
}

/// Requests and retries of the last seconds.
#[derive(Clone, Debug, Default)]
pub struct RetryBudget {
    seconds: [Second; BUDGET_SECONDS as usize],
    latest: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Second {
    at: u64,
    requests: u64,
    retries: u64,
}

impl RetryBudget {
    /// A request came.
    pub fn request(&mut self, now_ms: u64) {
        self.second(now_ms).requests += 1;
    }

    /// Takes one retry; `false`: there is none left.
    pub fn take(&mut self, rules: &BudgetRules, now_ms: u64) -> bool {
        self.second(now_ms);
        let is_granted = (self.retries() as f64) < self.granted(rules).floor();
        if is_granted {
            self.second(now_ms).retries += 1;
        }
        is_granted
    }

    fn granted(&self, rules: &BudgetRules) -> f64 {
        let requests: u64 = self.recent().map(|second| second.requests).sum();
        f64::from(rules.share) * requests as f64 + f64::from(rules.least_per_second) * BUDGET_SECONDS as f64
    }

    fn retries(&self) -> u64 {
        self.recent().map(|second| second.retries).sum()
    }

    fn recent(&self) -> impl Iterator<Item = &Second> {
        self.seconds.iter().filter(|second| second.at + BUDGET_SECONDS > self.latest)
    }

    fn second(&mut self, now_ms: u64) -> &mut Second {
        self.latest = self.latest.max(now_ms / 1000);
        let at = self.latest;
        let second = &mut self.seconds[(at % BUDGET_SECONDS) as usize];
        if second.at != at {
            *second = Second { at, ..Second::default() };
        }
        second
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RULES: BudgetRules = BudgetRules { share: 0.2, least_per_second: 1 };

    #[test]
    fn a_quiet_host_has_its_least_and_a_busy_one_its_share() {
        let mut budget = RetryBudget::default();
        let taken = (0..100).filter(|_| budget.take(&RULES, 5)).count();
        assert_eq!(taken, 10);
        (0..1000).for_each(|_| budget.request(900));
        let taken = (0..1000).filter(|_| budget.take(&RULES, 950)).count();
        assert_eq!(taken, 200);
        assert!(!budget.take(&RULES, 9_000), "all of it was within the window");
        assert!(budget.take(&RULES, 10_000), "the first second is over");
    }

    #[test]
    fn without_share_and_least_there_are_none() {
        let mut budget = RetryBudget::default();
        budget.request(0);
        assert!(!budget.take(&BudgetRules { share: 0.0, least_per_second: 0 }, 0));
    }

    proptest! {
        #[test]
        fn retries_never_exceed_what_the_window_grants(steps in prop::collection::vec((0u64..3000, any::<bool>()), 1..400)) {
            let mut budget = RetryBudget::default();
            let (mut now_ms, mut asked, mut taken) = (0u64, Vec::new(), Vec::new());
            for (pause_ms, is_retry) in steps {
                now_ms += pause_ms;
                if is_retry {
                    let of = |moments: &[u64]| moments.iter().filter(|at| *at / 1000 + BUDGET_SECONDS > now_ms / 1000).count();
                    let granted = (f64::from(RULES.share) * of(&asked) as f64 + 10.0).floor() as usize;
                    let before = of(&taken);
                    prop_assert_eq!(budget.take(&RULES, now_ms), before < granted);
                    if before < granted {
                        taken.push(now_ms);
                    }
                } else {
                    budget.request(now_ms);
                    asked.push(now_ms);
                }
            }
        }
    }
}
