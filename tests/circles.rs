//! Imports point one way: no circle between the files of a crate, and none between crates.
//!
//! The graph is made of `use` lines, and of paths in the code that begin with `crate`, `super`, `self` or a child module. A name that comes through a
//! re-export counts as an import of the file that defines it. Code under `#[cfg(test)]` does not count.

#[path = "imports/graph.rs"]
mod graph;
#[path = "imports/source.rs"]
mod source;

use std::path::Path;

use graph::{circle, imports};

#[test]
fn no_import_circle_between_files() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let workspace = source::workspace(&root);
    assert!(workspace.len() >= 4, "crates of the workspace: {:?}", workspace.keys());
    let mut found = Vec::new();
    for (name, folder) in &workspace {
        let edges = imports(folder, &workspace).files;
        assert!(edges.len() > 1, "{name} has files that import each other");
        if let Some(circle) = circle(&edges) {
            found.push(format!("{name}: {}", circle.join(" -> ")));
        }
    }
    assert!(found.is_empty(), "files import each other in a circle:\n{}", found.join("\n"));
}

#[test]
fn no_import_circle_between_crates() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let workspace = source::workspace(&root);
    let edges = workspace.iter().map(|(name, folder)| (name.clone(), imports(folder, &workspace).crates)).collect();
    assert_eq!(circle(&edges), None, "crates import each other in a circle");
}

#[test]
fn a_circle_is_found_through_re_exports_and_paths_in_code_but_not_through_tests() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join("src").join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    let found = || circle(&imports(folder.path(), &Default::default()).files).map(|circle| circle.join(" -> "));
    write("lib.rs", "mod a;\nmod b;\nmod room;\npub use a::A;\npub use room::{inner::{C, D as E}};\n");
    write("a.rs", "use crate::b::B; // crate::E\npub struct A; const TEXT: &str = \"crate::E\";");
    write("room/mod.rs", "pub mod inner;\nfn lifetime<'a>(x: &'a str) -> char { '\"' }");
    write("room/inner.rs", "pub struct C; pub enum D {}");
    write(
        "b.rs",
        "pub struct B;\n#[cfg(test)]\nmod tests { use crate::A; fn f() { crate::A; } }\n#[cfg(test)] use super::A;",
    );
    assert_eq!(found(), None);
    write("room/inner.rs", "pub struct C; pub enum D {}\nmod fused { fn f() -> super::super::super::A { todo!() } }");
    assert_eq!(found(), None, "a -> b, inner -> a");
    write("b.rs", "pub struct B(crate::E);");
    assert_eq!(found().unwrap(), "a.rs -> b.rs -> room/inner.rs -> a.rs");
    write("b.rs", "pub struct B;\nmacro_rules! make { () => { $crate::C } }");
    assert_eq!(found().unwrap(), "a.rs -> b.rs -> room/inner.rs -> a.rs");
    write("b.rs", "pub struct B;");
    write("room/mod.rs", "pub mod inner;\nuse inner::C;\npub struct R;");
    assert_eq!(found(), None);
    write("room/inner.rs", "use super::*;\npub struct C; pub enum D {}");
    assert_eq!(found().unwrap(), "room/inner.rs -> room/mod.rs -> room/inner.rs");
}
