//! Components written by hand: what no toolchain would make of a policy.

/// Bodies of a guest's functions, as text, each with the values on the stack that its type asks for.
pub(crate) struct Guest {
    pub(crate) schema: &'static str,
    pub(crate) configure: &'static str,
    pub(crate) route: &'static str,
    pub(crate) observe: &'static str,
    pub(crate) memory_pages: u32,
}

/// Body of a `configure` that does not accept its settings, and has nothing to say about them.
pub(crate) const REFUSES: &str = "(i32.store8 (i32.const 32) (i32.const 1))";

impl Default for Guest {
    /// A policy without settings that places every request on the first row.
    fn default() -> Self {
        Self { schema: "", configure: "", route: "(call $place (i32.const 64) (i32.const 1))", observe: "", memory_pages: 1 }
    }
}

/// The component. Its memory is zero but for what the bodies write: an empty schema at 16, the result of `configure` at
/// 32, rows at 64.
pub(crate) fn component(guest: &Guest) -> Vec<u8> {
    let Guest { schema, configure, route, observe, memory_pages } = guest;
    let text = format!(
        r#"(component
            (@custom "dynamo:policy" "name: raw\nversion: 1.0.0\n")
            (import "dynamo:policy/routing-answer@0.1.0"
                (instance $answer (export "place" (func (param "rows" (list u32))))))
            (core module $memory_module (memory (export "memory") {memory_pages}))
            (core instance $memory (instantiate $memory_module))
            (core func $place (canon lower (func $answer "place") (memory $memory "memory")))
            (core module $module
                (import "host" "place" (func $place (param i32 i32)))
                (import "memory" "memory" (memory 1))
                (func (export "realloc") (param i32 i32 i32 i32) (result i32) (i32.const 1024))
                (func (export "schema") (result i32) {schema} (i32.const 16))
                (func (export "configure") (param i32 i32) (result i32) {configure} (i32.const 32))
                (func (export "route") {route})
                (func (export "observe") {observe}))
            (core instance $guest (instantiate $module
                (with "host" (instance (export "place" (func $place))))
                (with "memory" (instance $memory))))
            (func $schema (result string)
                (canon lift (core func $guest "schema") (memory $memory "memory")))
            (func $configure (param "settings" string) (result (result (error string)))
                (canon lift (core func $guest "configure") (memory $memory "memory") (realloc (func $guest "realloc"))))
            (func $route (canon lift (core func $guest "route")))
            (func $observe (canon lift (core func $guest "observe")))
            (instance $lifecycle (export "settings-schema" (func $schema)) (export "configure" (func $configure)))
            (instance $routing (export "route" (func $route)) (export "observe" (func $observe)))
            (export "dynamo:policy/lifecycle@0.1.0" (instance $lifecycle))
            (export "dynamo:policy/routing@0.1.0" (instance $routing)))"#
    );
    wat::parse_str(text).unwrap_or_else(|error| panic!("{error}"))
}

/// Bodies of an admission policy's functions.
pub(crate) struct Admission<'a> {
    pub(crate) answer: &'a str,
    /// A function of an interface that gives a number, to import besides.
    pub(crate) asks: Option<(&'a str, &'a str)>,
}

impl Default for Admission<'_> {
    fn default() -> Self {
        Self { answer: "(call $admit)", asks: None }
    }
}

/// The component. Its memory is zero but for what the bodies write, so that a class of any bytes from 64 on is not printable.
pub(crate) fn admission(guest: &Admission<'_>) -> Vec<u8> {
    let Admission { answer, asks } = guest;
    let asks = asks.map_or(String::new(), |(interface, function)| {
        format!(r#"(import "dynamo:policy/{interface}@0.1.2" (instance (export "{function}" (func (result u32)))))"#)
    });
    let answers = [
        ("admit", "", ""),
        ("set-tier", r#"(param "tier" u32)"#, ""),
        ("set-class-weight", r#"(param "weight" f32)"#, ""),
        ("set-deadline-ms", r#"(param "deadline" u32)"#, ""),
        ("set-class", r#"(param "class" string)"#, r#"(memory $memory "memory")"#),
        (
            "shed",
            r#"(param "status" u16) (param "retry-after-ms" (option u32)) (param "reason" string)"#,
            r#"(memory $memory "memory")"#,
        ),
    ];
    let exports: String = answers.iter().map(|(name, params, _)| format!(r#"(export "{name}" (func {params}))"#)).collect();
    let lowered: String = answers
        .iter()
        .map(|(name, _, memory)| format!(r#"(core func ${name} (canon lower (func $answer "{name}") {memory}))"#))
        .collect();
    let given: String = answers.iter().map(|(name, ..)| format!(r#"(export "{name}" (func ${name}))"#)).collect();
    let text = format!(
        r#"(component
            (@custom "dynamo:policy" "name: raw\nversion: 1.0.0\n")
            {asks}
            (import "dynamo:policy/admission-answer@0.1.2" (instance $answer {exports}))
            (import "dynamo:policy/admission-pools@0.1.2" (instance $pools (export "count" (func (result u32)))))
            (core module $memory_module (memory (export "memory") 2))
            (core instance $memory (instantiate $memory_module))
            {lowered}
            (core func $count (canon lower (func $pools "count")))
            (core module $module
                (import "host" "admit" (func $admit))
                (import "host" "set-tier" (func $set_tier (param i32)))
                (import "host" "set-class-weight" (func $set_weight (param f32)))
                (import "host" "set-deadline-ms" (func $set_deadline (param i32)))
                (import "host" "set-class" (func $set_class (param i32 i32)))
                (import "host" "shed" (func $shed (param i32 i32 i32 i32 i32)))
                (import "host" "count" (func $count (result i32)))
                (import "memory" "memory" (memory 1))
                (func (export "realloc") (param i32 i32 i32 i32) (result i32) (i32.const 1024))
                (func (export "schema") (result i32) (i32.const 16))
                (func (export "configure") (param i32 i32) (result i32) (i32.const 32))
                (func (export "decide") {answer})
                (func (export "observe")))
            (core instance $guest (instantiate $module
                (with "host" (instance {given} (export "count" (func $count))))
                (with "memory" (instance $memory))))
            (func $schema (result string)
                (canon lift (core func $guest "schema") (memory $memory "memory")))
            (func $configure (param "settings" string) (result (result (error string)))
                (canon lift (core func $guest "configure") (memory $memory "memory") (realloc (func $guest "realloc"))))
            (func $decide (canon lift (core func $guest "decide")))
            (func $observe (canon lift (core func $guest "observe")))
            (instance $lifecycle (export "settings-schema" (func $schema)) (export "configure" (func $configure)))
            (instance $admitting (export "admit" (func $decide)) (export "observe" (func $observe)))
            (export "dynamo:policy/lifecycle@0.1.2" (instance $lifecycle))
            (export "dynamo:policy/admitting@0.1.2" (instance $admitting)))"#
    );
    wat::parse_str(text).unwrap_or_else(|error| panic!("{error}"))
}
