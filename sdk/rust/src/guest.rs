//! What [`register!`](crate::register) expands to: the glue between the contract's exports and a [`Router`] or an
//! [`Admission`] policy.

use std::cell::OnceCell;

use schemars::JsonSchema;
use serde::de::DeserializeOwned;

use crate::{
    Admission, Candidates, Outcomes, Pools, Request, Router,
    bindings::dynamo::policy::telemetry::{Level, log},
};

pub use wit_bindgen::rt as wit_bindgen_rt;

/// Reads the settings and makes the policy. Called once per instance.
///
/// # Errors
/// What is wrong with the settings, for the operator.
pub fn configure<P, S: DeserializeOwned>(
    policy: &OnceCell<P>,
    new: fn(S) -> Result<P, String>,
    settings: &str,
) -> Result<(), String> {
    // A panic ends the instance; its text is all that the operator gets to see of it.
    std::panic::set_hook(Box::new(|panic| log(Level::Error, &panic.to_string())));
    // With the path to the key that is wrong; serde_json alone gives its column.
    let deserializer = &mut serde_json::Deserializer::from_str(settings);
    let settings = serde_path_to_error::deserialize(deserializer).map_err(|error| error.to_string())?;
    let _ = policy.set(new(settings)?);
    Ok(())
}

/// JSON Schema of the settings that `new` takes.
#[must_use]
pub fn settings_schema<P, S: JsonSchema>(_new: fn(S) -> Result<P, String>) -> String {
    schemars::schema_for!(S).as_value().to_string()
}

/// Decides where one request goes.
pub fn route<R: Router>(policy: &OnceCell<R>) {
    configured(policy).route(&Request::default(), &Candidates::default()).answer();
}

/// Decides whether one request is let in.
pub fn admit<A: Admission>(policy: &OnceCell<A>) {
    configured(policy).admit(&Request::default(), &Pools::default()).answer();
}

/// Learns from what has ended.
pub fn observe<P>(policy: &OnceCell<P>, observe: fn(&P, &Outcomes)) {
    observe(configured(policy), &Outcomes::default());
}

/// Compiles for a policy that can be registered.
pub fn is_router<R: Router>() {}

/// Compiles for a policy that can be registered.
pub fn is_admission<A: Admission>() {}

fn configured<R>(policy: &OnceCell<R>) -> &R {
    policy.get().expect("the host configures an instance before it calls it")
}

/// Makes a type the policy of this crate, with the crate's name, version and authors as the policy's: `register!(Type)` where
/// it implements [`Router`](crate::Router), `register!(Type as Admission)` where it implements
/// [`Admission`](crate::Admission).
///
/// What it expands to is glue between WebAssembly and the trait, and unsafe: a crate that says
/// `#![forbid(unsafe_code)]` cannot hold it, since a forbidden lint cannot be allowed again. `#![deny(unsafe_code)]` does
/// as well, and nothing else of a policy needs unsafe code.
#[macro_export]
macro_rules! register {
    ($policy:ty) => {
        $crate::register!($policy as Router);
    };
    ($policy:ty as Router) => {
        $crate::__register! {
            $policy, Router, is_router, router, $crate::bindings::router::exports::dynamo::policy::routing::Guest, route,
            export_router
        }
    };
    ($policy:ty as Admission) => {
        $crate::__register! {
            $policy, Admission, is_admission, admission,
            $crate::bindings::admission::exports::dynamo::policy::admitting::Guest, admit, export_admission
        }
    };
}

/// What is alike for all worlds.
#[doc(hidden)]
#[macro_export]
macro_rules! __register {
    ($policy:ty, $trait:ident, $is:ident, $world:ident, $decides:path, $decide:ident, $export:ident) => {
        // Natively, in tests, a policy is only its trait: the exports' names are none that a native linker takes.
        const _: fn() = $crate::guest::$is::<$policy>;

        #[cfg(target_arch = "wasm32")]
        #[allow(unsafe_code, missing_docs)]
        const _: () = {
            ::std::thread_local! {
                static POLICY: ::std::cell::OnceCell<$policy> = const { ::std::cell::OnceCell::new() };
            }

            struct Component;

            impl $crate::bindings::exports::dynamo::policy::lifecycle::Guest for Component {
                fn settings_schema() -> ::std::string::String {
                    $crate::guest::settings_schema(<$policy as $crate::$trait>::new)
                }

                fn configure(settings: ::std::string::String) -> ::std::result::Result<(), ::std::string::String> {
                    let new = <$policy as $crate::$trait>::new;
                    POLICY.with(|policy| $crate::guest::configure(policy, new, &settings))
                }
            }

            impl $decides for Component {
                fn $decide() {
                    POLICY.with($crate::guest::$decide);
                }

                fn observe() {
                    POLICY.with(|policy| $crate::guest::observe(policy, <$policy as $crate::$trait>::observe));
                }
            }

    $crate::bindings::export_lifecycle!(Component with_types_in $crate::bindings);
    $crate::bindings::$world::$export!(Component with_types_in $crate::bindings::$world);

            const DESCRIPTION: &str = concat!(
                "name: ",
                env!("CARGO_PKG_NAME"),
                "\nversion: ",
                env!("CARGO_PKG_VERSION"),
                "\nauthor: ",
                env!("CARGO_PKG_AUTHORS"),
                "\n"
            );

            /// The custom section that tools read without running the policy.
            #[used]
            #[unsafe(link_section = "dynamo:policy")]
            static SECTION: [u8; DESCRIPTION.len()] = *DESCRIPTION.as_bytes().first_chunk().unwrap();
        };
    };
}
