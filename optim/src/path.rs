//! The path of a parameter while a module is visited.

/// Names from the root of a module to where a visitor stands. The variants of an enum stand in no path: what a layer holds is its own affair.
#[derive(Clone, Debug, Default)]
pub struct ModulePath {
    names: Vec<Option<String>>,
    containers: Vec<String>,
}

impl ModulePath {
    /// For [`ModuleVisitor::enter_module`](burn::module::ModuleVisitor::enter_module).
    pub fn enter(&mut self, name: &str, container: &str) {
        self.names.push((!container.starts_with("Enum:")).then(|| name.to_string()));
        self.containers.push(container.to_string());
    }

    /// For [`ModuleVisitor::exit_module`](burn::module::ModuleVisitor::exit_module).
    pub fn exit(&mut self) {
        self.names.pop();
        self.containers.pop();
    }

    /// The names, joined with dots.
    pub fn joined(&self) -> String {
        self.names().collect::<Vec<_>>().join(".")
    }

    /// The names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.names.iter().flatten().map(String::as_str)
    }

    /// Types of the modules on the way, such as `Struct:Embedding`.
    pub fn containers(&self) -> impl Iterator<Item = &str> {
        self.containers.iter().map(String::as_str)
    }
}
