//! Generated from `wit/current`: the contract as Rust functions. Policies use the types beside this module.
//!
//! A policy of any world exports `lifecycle`, and an interface of its own: each has its glue here, once, and
//! [`register!`](crate::register) puts two of them together. So the worlds below are parts of those of the contract.
#![allow(missing_docs, unsafe_code, unreachable_pub, clippy::all, clippy::undocumented_unsafe_blocks)]

wit_bindgen::generate!({
    path: "../../wit/current",
    inline: "
        package sdk:lifecycle;
        world every-policy {
            import dynamo:policy/request@0.1.3;
            import dynamo:policy/outcomes@0.1.3;
            import dynamo:policy/state@0.1.3;
            import dynamo:policy/clock@0.1.3;
            import dynamo:policy/entropy@0.1.3;
            import dynamo:policy/telemetry@0.1.3;
            export dynamo:policy/lifecycle@0.1.3;
        }
    ",
    world: "sdk:lifecycle/every-policy",
    generate_all,
    pub_export_macro: true,
    export_macro_name: "export_lifecycle",
    default_bindings_module: "dynamo_policy_sdk::bindings",
    runtime_path: "dynamo_policy_sdk::guest::wit_bindgen_rt",
});

/// What only the world `router` has.
pub mod router {
    wit_bindgen::generate!({
        path: "../../wit/current",
        inline: "
            package sdk:router;
            world routers-own {
                import dynamo:policy/candidates@0.1.3;
                import dynamo:policy/links@0.1.3;
                import dynamo:policy/routing-answer@0.1.3;
                export dynamo:policy/routing@0.1.3;
            }
        ",
        world: "sdk:router/routers-own",
        generate_all,
        pub_export_macro: true,
        export_macro_name: "export_router",
        default_bindings_module: "dynamo_policy_sdk::bindings::router",
        runtime_path: "dynamo_policy_sdk::guest::wit_bindgen_rt",
    });
}

/// What only the world `admission` has.
pub mod admission {
    wit_bindgen::generate!({
        path: "../../wit/current",
        inline: "
            package sdk:admission;
            world admissions-own {
                import dynamo:policy/admission-pools@0.1.3;
                import dynamo:policy/admission-answer@0.1.3;
                export dynamo:policy/admitting@0.1.3;
            }
        ",
        world: "sdk:admission/admissions-own",
        generate_all,
        pub_export_macro: true,
        export_macro_name: "export_admission",
        default_bindings_module: "dynamo_policy_sdk::bindings::admission",
        runtime_path: "dynamo_policy_sdk::guest::wit_bindgen_rt",
    });
}
