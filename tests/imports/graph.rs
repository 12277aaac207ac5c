//! Which file imports which.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::{Path, PathBuf};

use crate::source::{Module, modules};

/// A name with the names that it imports.
pub type Edges = BTreeMap<String, BTreeSet<String>>;

/// Imports of a crate.
#[derive(Debug, Default)]
pub struct Imports {
    /// Between its files.
    pub files: Edges,
    /// Of other crates of the workspace.
    pub crates: BTreeSet<String>,
}

/// Reads the imports of the crate in this folder.
pub fn imports(folder: &Path, workspace: &BTreeMap<String, PathBuf>) -> Imports {
    let root = modules(folder);
    let mut imports = Imports::default();
    visit(&root, &mut Vec::new(), &mut |module, place| {
        let edges = imports.files.entry(module.file.clone()).or_default();
        let paths = module.imports.iter().map(|import| &import.path).chain(&module.paths);
        for path in paths {
            edges.extend(file_of(&root, place, path, 0).filter(|file| *file != module.file));
            let krate = path[..1].join("").replace('_', "-");
            if workspace.contains_key(&krate) {
                imports.crates.insert(krate);
            }
        }
    });
    imports
}

fn visit<'a>(module: &'a Module, place: &mut Vec<String>, run: &mut impl FnMut(&'a Module, &[String])) {
    run(module, place);
    for (name, child) in &module.children {
        place.push(name.clone());
        visit(child, place, run);
        place.pop();
    }
}

fn at<'a>(root: &'a Module, place: &[String]) -> Option<&'a Module> {
    place.iter().try_fold(root, |module, name| module.children.get(name))
}

/// The file that defines what a path in the module at `place` names; none when that is in another crate.
fn file_of(root: &Module, place: &[String], path: &[String], depth: usize) -> Option<String> {
    let (mut here, mut rest) = (place.to_vec(), path);
    let start = rest.first()?.as_str();
    match start {
        "crate" => (here, rest) = (Vec::new(), &rest[1..]),
        "self" => rest = &rest[1..],
        "super" => {}
        child if at(root, place)?.children.contains_key(child) => {}
        _ => return None,
    }
    while let Some(name) = rest.first() {
        match name.as_str() {
            "super" => drop(here.pop()?),
            child if at(root, &here)?.children.contains_key(child) => here.push(child.to_string()),
            _ => break,
        }
        rest = &rest[1..];
    }
    let module = at(root, &here)?;
    let Some(item) = rest.first() else { return Some(module.file.clone()) };
    // Deeper than this only where two modules import all of each other.
    if module.items.contains(item) || depth > 8 {
        return Some(module.file.clone());
    }
    if let Some(import) = module.imports.iter().find(|import| import.name == *item && import.path.len() > 1) {
        let through: Vec<String> = import.path.iter().chain(&rest[1..]).cloned().collect();
        return file_of(root, &here, &through, depth + 1);
    }
    let all = module.imports.iter().filter(|import| import.name == "*");
    let defined = |place: &[String], import: &[String]| {
        let through: Vec<String> = import.iter().chain(rest).cloned().collect();
        let file = file_of(root, place, &through, depth + 1)?;
        let target = file_of(root, place, import, depth + 1)?;
        (file != target || at_items(root, &file, item)).then_some(file)
    };
    all.filter_map(|import| defined(&here, &import.path)).next().or_else(|| Some(module.file.clone()))
}

/// Returns true if a module of this file defines the item.
fn at_items(root: &Module, file: &str, item: &str) -> bool {
    let mut found = false;
    visit(root, &mut Vec::new(), &mut |module, _| {
        found |= module.file == file && module.items.iter().any(|i| i == item)
    });
    found
}

/// A shortest circle, from the first name that is in one back to it.
pub fn circle(edges: &Edges) -> Option<Vec<String>> {
    edges.keys().find_map(|start| {
        let mut from: BTreeMap<&String, &String> = BTreeMap::new();
        let mut next = VecDeque::from([start]);
        while let Some(name) = next.pop_front() {
            for to in edges.get(name).into_iter().flatten() {
                if to == start {
                    let mut circle = vec![start.clone()];
                    let mut back = name;
                    while back != start {
                        circle.push(back.clone());
                        back = from[back];
                    }
                    circle.push(start.clone());
                    circle.reverse();
                    return Some(circle);
                }
                if !from.contains_key(to) {
                    from.insert(to, name);
                    next.push_back(to);
                }
            }
        }
        None
    })
}
