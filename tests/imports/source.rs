//! Modules of a crate with what they define and what they import, read from its files.

use std::collections::BTreeMap;
use std::fs::read_to_string;
use std::path::{Path, PathBuf};

/// A path with its last name, and the name under which it is imported; `*` for all.
#[derive(Clone, Debug)]
pub struct Import {
    pub path: Vec<String>,
    pub name: String,
}

/// A module; one that stands within a file has the file's name.
#[derive(Debug, Default)]
pub struct Module {
    pub file: String,
    pub children: BTreeMap<String, Module>,
    pub items: Vec<String>,
    pub imports: Vec<Import>,
    /// Paths in the code.
    pub paths: Vec<Vec<String>>,
}

/// Folders of the workspace's library crates by their names.
pub fn workspace(root: &Path) -> BTreeMap<String, PathBuf> {
    let manifest = read_to_string(root.join("Cargo.toml")).unwrap();
    let members = manifest.split_once("members = [").unwrap().1.split_once(']').unwrap().0;
    let folders = members.split(',').map(|member| root.join(member.trim().trim_matches('"')));
    let name = |folder: &Path| {
        let manifest = read_to_string(folder.join("Cargo.toml")).unwrap();
        manifest.split_once("name = \"").unwrap().1.split_once('"').unwrap().0.to_string()
    };
    folders.filter(|folder| folder.join("src/lib.rs").exists()).map(|folder| (name(&folder), folder)).collect()
}

/// The modules of the crate in this folder.
pub fn modules(folder: &Path) -> Module {
    let source = folder.join("src");
    read(&source, "lib.rs", &source)
}

fn read(source: &Path, file: &str, children_in: &Path) -> Module {
    let tokens = tokens(&read_to_string(source.join(file)).unwrap());
    let mut reader = Reader { tokens: &tokens, at: 0, source, file };
    reader.module(children_in)
}

struct Reader<'a> {
    tokens: &'a [String],
    at: usize,
    source: &'a Path,
    file: &'a str,
}

impl Reader<'_> {
    fn peek(&self, ahead: usize) -> &str {
        self.tokens.get(self.at + ahead).map_or("", String::as_str)
    }

    fn next(&mut self) -> String {
        self.at += 1;
        self.tokens[self.at - 1].clone()
    }

    /// Reads to the end of the module, or of the file.
    fn module(&mut self, children_in: &Path) -> Module {
        let mut module = Module { file: self.file.to_string(), ..Module::default() };
        let mut depth = 0;
        while self.at < self.tokens.len() {
            match self.peek(0) {
                "}" if depth == 0 => break,
                "#" if self.peek(1) == "[" => {
                    if self.attribute_is_of_tests() {
                        self.skip_item();
                    }
                    continue;
                }
                "mod" if depth == 0 && self.peek(2) == ";" => {
                    let name = self.peek(1).to_string();
                    module.children.insert(name.clone(), self.child(&name, children_in));
                }
                "mod" if self.peek(2) == "{" => {
                    let name = self.peek(1).to_string();
                    self.at += 3;
                    let child = self.module(&children_in.join(&name));
                    module.children.insert(name, child);
                }
                "use" if self.peek(1) != "<" => {
                    self.at += 1;
                    self.tree(&mut Vec::new(), &mut module.imports);
                }
                "struct" | "enum" | "union" | "trait" | "fn" | "const" | "static" | "type" if depth == 0 => {
                    module.items.push(self.peek(1).to_string());
                }
                // A path that limits who sees an item imports nothing.
                "pub" if self.peek(1) == "(" => {
                    while self.peek(0) != ")" {
                        self.at += 1;
                    }
                }
                "macro_rules" => module.items.push(self.peek(2).to_string()),
                "{" => depth += 1,
                "}" => depth -= 1,
                _ if self.peek(1) == "::" && (self.at == 0 || self.tokens[self.at - 1] != "::") => {
                    let path = self.path();
                    // What a macro puts after `super::` is not known here.
                    if !path.last().is_some_and(|name| ["crate", "self", "super"].contains(&name.as_str())) {
                        module.paths.push(path);
                    }
                    continue;
                }
                _ => {}
            }
            self.at += 1;
        }
        module
    }

    fn child(&self, name: &str, children_in: &Path) -> Module {
        let flat = children_in.join(format!("{name}.rs"));
        let path = if flat.exists() { flat } else { children_in.join(name).join("mod.rs") };
        let file = path.strip_prefix(self.source).unwrap().to_str().unwrap().to_string();
        read(self.source, &file, &children_in.join(name))
    }

    /// `a::b::c`, from its first name.
    fn path(&mut self) -> Vec<String> {
        let mut path = vec![self.next()];
        while self.peek(0) == "::" && self.peek(1).starts_with(|c: char| c.is_alphabetic() || c == '_') {
            self.at += 1;
            path.push(self.next());
        }
        if self.peek(0) == "::" {
            self.at += 1;
        }
        path
    }

    /// A use tree, to the token before the one that ends it.
    fn tree(&mut self, prefix: &mut Vec<String>, imports: &mut Vec<Import>) {
        let begin = prefix.len();
        loop {
            match self.peek(0) {
                "::" => self.at += 1,
                "{" => {
                    self.at += 1;
                    while self.peek(0) != "}" {
                        self.tree(prefix, imports);
                        if self.peek(0) == "," {
                            self.at += 1;
                        }
                    }
                    self.at += 1;
                    break;
                }
                ";" | "," | "}" => {
                    let last = prefix.last().cloned().unwrap_or_default();
                    if last == "self" {
                        prefix.pop();
                    }
                    let name = prefix.last().cloned().unwrap_or_default();
                    imports.push(Import { path: prefix.clone(), name });
                    break;
                }
                "as" => {
                    let name = self.peek(1).to_string();
                    imports.push(Import { path: prefix.clone(), name });
                    self.at += 2;
                    break;
                }
                "*" => {
                    imports.push(Import { path: prefix.clone(), name: "*".to_string() });
                    self.at += 1;
                    break;
                }
                _ => {
                    let segment = self.next();
                    prefix.push(segment);
                }
            }
        }
        prefix.truncate(begin);
    }

    /// Reads an attribute.
    fn attribute_is_of_tests(&mut self) -> bool {
        let mut depth = 0;
        let begin = self.at;
        loop {
            match self.next().as_str() {
                "[" => depth += 1,
                "]" if depth == 1 => break,
                "]" => depth -= 1,
                _ => {}
            }
        }
        let words = &self.tokens[begin..self.at];
        words[2] == "cfg" && words.iter().any(|word| word == "test") && words.iter().all(|word| word != "not")
    }

    /// Passes over the item that begins here: to its semicolon or its closing brace.
    fn skip_item(&mut self) {
        let mut depth = 0;
        while self.at < self.tokens.len() {
            match self.next().as_str() {
                "{" | "(" | "[" => depth += 1,
                "}" if depth == 1 => {
                    if self.peek(0) == ";" {
                        self.at += 1;
                    }
                    break;
                }
                "}" | ")" | "]" => depth -= 1,
                ";" if depth == 0 => break,
                _ => {}
            }
        }
    }
}

/// Names, `::` and single signs; without comments and literals.
fn tokens(text: &str) -> Vec<String> {
    let c: Vec<char> = text.chars().collect();
    let at = |i: usize| c.get(i).copied().unwrap_or('\0');
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    let mut found = Vec::new();
    let mut i = 0;
    while i < c.len() {
        if at(i) == '/' && at(i + 1) == '/' {
            while i < c.len() && at(i) != '\n' {
                i += 1;
            }
        } else if at(i) == '/' && at(i + 1) == '*' {
            let mut depth = 1;
            i += 2;
            while i < c.len() && depth > 0 {
                match (at(i), at(i + 1)) {
                    ('/', '*') => depth += 1,
                    ('*', '/') => depth -= 1,
                    _ => {
                        i += 1;
                        continue;
                    }
                }
                i += 2;
            }
        } else if at(i) == '"' {
            i += 1;
            while i < c.len() && at(i) != '"' {
                i += if at(i) == '\\' { 2 } else { 1 };
            }
            i += 1;
        } else if at(i) == '\'' {
            // A lifetime has no second quote right after its first letter.
            if at(i + 1) == '\\' || at(i + 2) == '\'' {
                i += if at(i + 1) == '\\' { 3 } else { 2 };
                while at(i) != '\'' {
                    i += 1;
                }
            }
            i += 1;
        } else if is_name(at(i)) {
            let begin = i;
            while is_name(at(i)) {
                i += 1;
            }
            let name: String = c[begin..i].iter().collect();
            let fences = (i..).take_while(|j| at(*j) == '#').count();
            if ["r", "br", "cr"].contains(&name.as_str()) && at(i + fences) == '"' {
                i += fences + 1;
                while !(at(i) == '"' && (i + 1..=i + fences).all(|j| at(j) == '#')) {
                    i += 1;
                }
                i += fences + 1;
            } else {
                found.push(name);
            }
        } else if at(i) == ':' && at(i + 1) == ':' {
            found.push("::".to_string());
            i += 2;
        } else {
            if !at(i).is_whitespace() {
                found.push(at(i).to_string());
            }
            i += 1;
        }
    }
    found
}
