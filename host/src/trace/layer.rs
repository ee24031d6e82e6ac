//! From the log's events to the facts of exported spans.
//!
//! The stages of a request already say what they do as events of the log, most of them at a level that nobody prints:
//! here their fields become attributes of the request's span, and those that tell of a stage become spans below it. So
//! the request path knows no exporter, and pays for none where there is none.

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use opentelemetry::{
    Context, KeyValue, Value,
    trace::{Span as _, SpanBuilder, TraceContextExt as _, Tracer as _},
};
use opentelemetry_sdk::trace::SdkTracer;
use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
    span,
};
use tracing_subscriber::{Layer, Registry, layer, registry::LookupSpan};

use super::STAGE;

/// Who is listened to.
const OURS: &str = "dynamo_host::";
/// The stages that become spans of their own name.
const STAGES: [&str; 6] = ["decode", "tokenize", "admission", "queue", "route", LAST_BEFORE_RELAY];
/// The stage after which the answer is relayed.
const LAST_BEFORE_RELAY: &str = "dispatch";

/// An exported span that lives as long as a span of the log.
struct Live {
    context: Context,
    /// When the engine was found whose answer is relayed.
    relay_since: Option<SystemTime>,
}

/// Makes `span` of the log tell the span of a context, which ends with it.
pub(crate) fn attach(span: &tracing::Span, context: Context) {
    span.with_subscriber(|(id, subscriber)| {
        if let Some(span) = subscriber.downcast_ref::<Registry>().and_then(|registry| registry.span(id)) {
            span.extensions_mut().insert(Live { context, relay_since: None });
        }
    });
}

/// The layer of a subscriber that listens.
pub(crate) struct SpanFacts {
    tracer: SdkTracer,
}

impl SpanFacts {
    pub(super) fn new(tracer: SdkTracer) -> Self {
        Self { tracer }
    }

    fn child(&self, name: &'static str, parent: &Context, from: SystemTime, to: SystemTime) {
        let builder = SpanBuilder::from_name(name).with_start_time(from);
        self.tracer.build_with_context(builder, parent).end_with_timestamp(to);
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for SpanFacts {
    fn on_event(&self, event: &Event<'_>, context: layer::Context<'_, S>) {
        let metadata = event.metadata();
        if !metadata.target().starts_with(OURS) {
            return;
        }
        for span in context.event_scope(event).into_iter().flatten() {
            let mut extensions = span.extensions_mut();
            let Some(live) = extensions.get_mut::<Live>() else { continue };
            if metadata.target() == STAGE {
                let mut stage = Stage::default();
                event.record(&mut stage);
                let now = SystemTime::now();
                self.child(stage.name, &live.context, now - stage.took, now);
                live.relay_since = (stage.name == LAST_BEFORE_RELAY).then_some(now);
                return;
            }
            let mut facts = Facts::default();
            event.record(&mut facts);
            let exported = live.context.span();
            exported.set_attributes(facts.attributes);
            if *metadata.level() <= Level::WARN {
                exported.add_event(facts.message, Vec::new());
            }
            return;
        }
    }

    fn on_close(&self, id: span::Id, context: layer::Context<'_, S>) {
        let Some(span) = context.span(&id) else { return };
        let Some(live) = span.extensions_mut().remove::<Live>() else { return };
        if let Some(since) = live.relay_since {
            self.child("relay", &live.context, since, SystemTime::now());
        }
        live.context.span().end();
    }
}

/// The fields of an event as attributes.
#[derive(Default)]
struct Facts {
    message: String,
    attributes: Vec<KeyValue>,
}

impl Facts {
    fn add(&mut self, field: &Field, value: impl Into<Value>) {
        let value = value.into();
        self.attributes.push(match field.name() {
            "model" => KeyValue::new("gen_ai.request.model", value),
            "status" => KeyValue::new("http.response.status_code", value),
            "tokens" => KeyValue::new("gen_ai.usage.output_tokens", value),
            "code" => KeyValue::new("error.type", value),
            name => KeyValue::new(format!("dynamo_host.{name}"), value),
        });
    }
}

impl Visit for Facts {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.message = format!("{value:?}");
        } else {
            self.add(field, format!("{value:?}"));
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field, value.to_owned());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.add(field, value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.add(field, i64::try_from(value).unwrap_or(i64::MAX));
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        // What is not known is NaN.
        if value.is_finite() {
            self.add(field, value);
        }
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.add(field, value);
    }
}

/// A stage that is over.
#[derive(Default)]
struct Stage {
    name: &'static str,
    took: Duration,
}

impl Visit for Stage {
    fn record_debug(&mut self, _: &Field, _: &dyn fmt::Debug) {}

    fn record_str(&mut self, _: &Field, value: &str) {
        // Names of spans are static: these are all there are.
        self.name = STAGES.into_iter().find(|&name| name == value).unwrap_or("stage");
    }

    fn record_u64(&mut self, _: &Field, value: u64) {
        self.took = Duration::from_nanos(value);
    }
}
