//! The contract and its host side hold each other to their word.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use wasmtime::component::{Component, Linker};
use wit_component::{ComponentEncoder, StringEncoding, dummy_module, embed_component_metadata, semver_check};
use wit_parser::{ManglingAndAbi, Resolve, WorldId, WorldKey};

use super::{VERSION, link};
use crate::{
    Limits, Now, PolicyRuntime,
    world::{LIFECYCLE, World},
};

fn wit() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../wit")
}

/// The texts of a folder's files, joined as one package.
fn package_text(directory: &Path) -> String {
    let mut files: Vec<PathBuf> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "wit"))
        .collect();
    files.sort();
    let texts = files.iter().map(|file| fs::read_to_string(file).unwrap());
    let bodies: Vec<String> =
        texts.map(|text| text.lines().filter(|line| !line.starts_with("package ")).collect::<Vec<_>>().join("\n")).collect();
    bodies.join("\n")
}

fn parse(resolve: &mut Resolve, version: &str, body: &str, world: &str) -> WorldId {
    let package = resolve.push_str("contract.wit", &format!("package dynamo:policy@{version};\n{body}")).unwrap();
    resolve.select_world(&[package], Some(world)).unwrap()
}

/// A component that imports and exports all of a world.
fn dummy(resolve: &Resolve, world: WorldId) -> Vec<u8> {
    let mut module = dummy_module(resolve, world, ManglingAndAbi::Standard32);
    embed_component_metadata(&mut module, resolve, world, StringEncoding::UTF8).unwrap();
    ComponentEncoder::default().module(&module).unwrap().validate(true).encode().unwrap()
}

#[test]
fn the_host_has_every_function_of_every_world_that_it_runs_with_its_type() {
    let runtime = PolicyRuntime::new(Limits::default(), Arc::new(Now::default), None).unwrap();
    let mut linker = Linker::new(runtime.engine());
    link(&mut linker).unwrap();
    for world in World::ALL {
        let mut resolve = Resolve::default();
        let id = parse(&mut resolve, VERSION, &package_text(&wit().join("current")), world.name);
        let component = Component::new(runtime.engine(), dummy(&resolve, id)).unwrap();
        linker.instantiate_pre(&component).map(drop).unwrap();
    }
}

/// Names of the interfaces that a world imports and exports.
fn interfaces(world: &str) -> (Vec<String>, Vec<String>) {
    let mut resolve = Resolve::default();
    let id = parse(&mut resolve, VERSION, &package_text(&wit().join("current")), world);
    let world = &resolve.worlds[id];
    let names = |items: &mut dyn Iterator<Item = &WorldKey>| -> Vec<String> {
        let mut names: Vec<String> = items
            .map(|key| match key {
                WorldKey::Name(name) => name.clone(),
                WorldKey::Interface(id) => resolve.interfaces[*id].name.clone().unwrap(),
            })
            .collect();
        names.sort();
        names
    };
    (names(&mut world.imports.keys()), names(&mut world.exports.keys()))
}

#[test]
fn what_a_world_may_import_and_must_export_is_what_the_contract_says() {
    let sorted = |names: &[&str]| {
        let mut names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        names.sort();
        names
    };
    for world in World::ALL {
        assert_eq!(interfaces(world.name), (sorted(world.imports), sorted(&[LIFECYCLE, world.decides.0])), "{world}");
    }
}

#[test]
fn the_host_speaks_the_version_that_the_contract_states() {
    let text = fs::read_to_string(wit().join("current/router.wit")).unwrap();
    assert!(text.contains(&format!("package dynamo:policy@{VERSION};")));
}

#[test]
fn all_three_worlds_parse() {
    for world in ["router", "admission", "autoscaler"] {
        parse(&mut Resolve::default(), VERSION, &package_text(&wit().join("current")), world);
    }
}

/// Whether a guest of the first text runs on a host of the second.
fn is_compatible(old: (&str, &str), new: (&str, &str), world: &str) -> Result<(), String> {
    let mut resolve = Resolve::default();
    let old = parse(&mut resolve, old.0, old.1, world);
    let new = parse(&mut resolve, new.0, new.1, world);
    semver_check(resolve, old, new).map_err(|error| format!("{error:#}"))
}

/// Names of the worlds that a package's text defines.
fn worlds_of(text: &str) -> Vec<&str> {
    text.lines().filter_map(|line| line.strip_prefix("world ")?.strip_suffix(" {")).collect()
}

#[test]
fn every_released_world_still_runs_on_the_current_contract() {
    let current = wit().join("current");
    let mut released = BTreeSet::new();
    for release in fs::read_dir(wit().join("released")).unwrap().map(|entry| entry.unwrap().path()) {
        let version = release.file_name().unwrap().to_str().unwrap();
        let text = package_text(&release);
        if version == VERSION {
            // Nothing was added since: what is released is what is current, to the byte.
            for file in fs::read_dir(&release).unwrap().map(|entry| entry.unwrap().path()) {
                let name = file.file_name().unwrap();
                let same = fs::read(&file).unwrap() == fs::read(current.join(name)).unwrap();
                assert!(same, "{name:?} of released {version} changed: raise the version of the package in wit/current first");
            }
        }
        // As if it were of the version before: two packages of one name and version cannot be compared.
        let version = if version == VERSION { "0.1.0" } else { version };
        for world in worlds_of(&text) {
            is_compatible((version, &text), (VERSION, &package_text(&current)), world).unwrap();
            released.insert(world.to_owned());
        }
    }
    assert!(World::ALL.iter().all(|world| released.contains(world.name)), "a world that is run is frozen: {released:?}");
}

#[test]
fn an_added_import_is_compatible_and_a_removed_or_changed_one_is_not() {
    let old = package_text(&wit().join("current"));
    let count = "  count: func() -> u32;\n\n  /// Stable identity";
    assert!(old.contains(count));
    let change = |to: &str| old.replacen(count, to, 1);
    let check = |new: &str| is_compatible(("0.1.1", &old), (VERSION, new), "router");
    check(&change(&format!("  more: func() -> list<u32>;\n{count}"))).unwrap();
    check(&change("  /// Stable identity")).unwrap_err();
    check(&change(&count.replace("u32", "u64"))).unwrap_err();
    check(&old.replace("  observe: func();", "  observe: func();\n  forget: func();")).unwrap_err();
}
