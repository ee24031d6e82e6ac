//! What [`register!`](crate::register) expands to: the glue between the contract's exports and a [`Router`].

use std::cell::OnceCell;

use crate::{
    Candidates, Outcomes, Request, Router,
    bindings::dynamo::policy::telemetry::{Level, log},
};

pub use wit_bindgen::rt as wit_bindgen_rt;

/// Reads the settings and makes the policy. Called once per instance.
///
/// # Errors
/// What is wrong with the settings, for the operator.
pub fn configure<R: Router>(policy: &OnceCell<R>, settings: &str) -> Result<(), String> {
    // A panic ends the instance; its text is all that the operator gets to see of it.
    std::panic::set_hook(Box::new(|panic| log(Level::Error, &panic.to_string())));
    // With the path to the key that is wrong; serde_json alone gives its column.
    let deserializer = &mut serde_json::Deserializer::from_str(settings);
    let settings = serde_path_to_error::deserialize(deserializer).map_err(|error| error.to_string())?;
    let _ = policy.set(R::new(settings)?);
    Ok(())
}

/// Decides one request.
pub fn route<R: Router>(policy: &OnceCell<R>) {
    configured(policy).route(&Request::default(), &Candidates::default()).answer();
}

/// Learns from what has ended.
pub fn observe<R: Router>(policy: &OnceCell<R>) {
    configured(policy).observe(&Outcomes::default());
}

/// JSON Schema of the settings.
#[must_use]
pub fn settings_schema<R: Router>() -> String {
    schemars::schema_for!(R::Settings).as_value().to_string()
}

/// Compiles for a policy that can be registered.
pub fn is_router<R: Router>() {}

fn configured<R>(policy: &OnceCell<R>) -> &R {
    policy.get().expect("the host configures an instance before it calls it")
}

/// Makes a type that implements [`Router`](crate::Router) the policy of this crate, with the crate's name, version
/// and authors as the policy's.
///
/// What it expands to is glue between WebAssembly and the trait, and unsafe: a crate that says
/// `#![forbid(unsafe_code)]` cannot hold it, since a forbidden lint cannot be allowed again. `#![deny(unsafe_code)]` does
/// as well, and nothing else of a policy needs unsafe code.
#[macro_export]
macro_rules! register {
    ($policy:ty) => {
        // Natively, in tests, a policy is only its trait: the exports' names are none that a native linker takes.
        const _: fn() = $crate::guest::is_router::<$policy>;

        #[cfg(target_arch = "wasm32")]
        #[allow(unsafe_code, missing_docs)]
        const _: () = {
            ::std::thread_local! {
                static POLICY: ::std::cell::OnceCell<$policy> = const { ::std::cell::OnceCell::new() };
            }

            struct Component;

            impl $crate::bindings::exports::dynamo::policy::lifecycle::Guest for Component {
                fn settings_schema() -> ::std::string::String {
                    $crate::guest::settings_schema::<$policy>()
                }

                fn configure(settings: ::std::string::String) -> ::std::result::Result<(), ::std::string::String> {
                    POLICY.with(|policy| $crate::guest::configure(policy, &settings))
                }
            }

            impl $crate::bindings::exports::dynamo::policy::routing::Guest for Component {
                fn route() {
                    POLICY.with($crate::guest::route);
                }

                fn observe() {
                    POLICY.with($crate::guest::observe);
                }
            }

    $crate::bindings::export_router!(Component with_types_in $crate::bindings);

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
