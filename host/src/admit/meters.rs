//! What is measured of admission and queue, by class; a policy can make up names of classes, so that only so many are
//! labels, and all others are one.

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, RwLock},
};

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};

use crate::config::MAX_CLASSES;

/// What those without a class are called.
const NONE: &str = "default";
/// The label of classes that there are too many of.
const OTHER: &str = "other";

/// Handles of what every request touches.
#[derive(Debug, Default)]
pub(super) struct Meters(RwLock<HashMap<Box<str>, Arc<OfClass>>>);

/// Of one class.
pub(super) struct OfClass {
    label: Arc<str>,
    pub(super) admitted: Counter,
    pub(super) shed: Counter,
    pub(super) wait: Histogram,
}

impl std::fmt::Debug for OfClass {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.label)
    }
}

impl Meters {
    pub(super) fn of(&self, class: Option<&str>) -> Arc<OfClass> {
        let class = class_label(class);
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(of_class) = known.get(class) {
            return Arc::clone(of_class);
        }
        // One for those without a class, one for those that are too many.
        let label = if known.len() < MAX_CLASSES + 1 { class } else { OTHER };
        drop(known);
        let mut known = self.0.write().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(known.entry(label.into()).or_insert_with(|| Arc::new(OfClass::new(label))))
    }
}

impl OfClass {
    fn new(class: &str) -> Self {
        let verdict = |verdict: &'static str| {
            let class = class.to_owned();
            counter!("dynamo_host_admission_total", "verdict" => verdict, "class" => class)
        };
        Self {
            label: class.into(),
            admitted: verdict("admit"),
            shed: verdict("shed"),
            wait: histogram!("dynamo_host_queue_wait_seconds", "class" => class.to_owned()),
        }
    }

    /// Where a request is counted that waits.
    pub(super) fn waiting(&self, model: &str, prompt_tokens: u32) -> Waiting {
        let labels = [("model", model.to_owned()), ("class", self.label.to_string())];
        Waiting {
            requests: gauge!("dynamo_host_queue_requests", &labels),
            tokens: gauge!("dynamo_host_queue_tokens", &labels),
            prompt_tokens: f64::from(prompt_tokens),
        }
    }
}

/// One request's part of what waits, not counted yet.
pub(super) struct Waiting {
    requests: Gauge,
    tokens: Gauge,
    prompt_tokens: f64,
}

impl Waiting {
    /// It waits, for as long as what comes of it lives.
    pub(super) fn count(self) -> Waits {
        self.requests.increment(1.0);
        self.tokens.increment(self.prompt_tokens);
        Waits(self)
    }
}

/// One request that is counted as waiting.
pub(super) struct Waits(Waiting);

impl Drop for Waits {
    fn drop(&mut self) {
        self.0.requests.decrement(1.0);
        self.0.tokens.decrement(self.0.prompt_tokens);
    }
}

/// What a class is called, for metrics and people.
pub(super) fn class_label(class: Option<&str>) -> &str {
    class.unwrap_or(NONE)
}

/// Counts a request that was not let in, or that waited for nothing.
pub(super) fn count_shed(reason: &'static str) {
    counter!("dynamo_host_shed_total", "reason" => reason).increment(1);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_beyond_what_may_be_labels_are_one() {
        let meters = Meters::default();
        let of = |class: Option<&str>| meters.of(class).label.to_string();
        assert_eq!((of(None).as_str(), of(Some("a")).as_str()), ("default", "a"));
        let labels: Vec<String> = (0..100).map(|class| of(Some(&class.to_string()))).collect();
        assert_eq!(labels.iter().filter(|label| *label != OTHER).count(), MAX_CLASSES - 1);
        assert_eq!((of(Some("99")).as_str(), of(Some("a")).as_str()), (OTHER, "a"));
        assert!(meters.0.read().unwrap().len() <= MAX_CLASSES + 2);
    }
}
