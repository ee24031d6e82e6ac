//! Generated from `wit/current`: the contract as Rust functions. Policies use the types beside this module.
#![allow(missing_docs, unsafe_code, unreachable_pub, clippy::all, clippy::undocumented_unsafe_blocks)]

wit_bindgen::generate!({
    path: "../../wit/current",
    world: "router",
    pub_export_macro: true,
    export_macro_name: "export_router",
    default_bindings_module: "dynamo_policy_sdk::bindings",
    runtime_path: "dynamo_policy_sdk::guest::wit_bindgen_rt",
});
