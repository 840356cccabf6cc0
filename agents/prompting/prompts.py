"""The prompt templates in `prompts/`, filled with exactly the variables that they use."""

from importlib import resources

from jinja2 import Environment, FunctionLoader, StrictUndefined, meta


class PromptTemplates:
    """The prompt templates by name: `initializer_edits`, `mutator_lists`, …"""

    def __init__(self) -> None:
        self._environment = Environment(
            loader=FunctionLoader(_read),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            autoescape=False,
        )

    def fill(self, name: str, **variables: object) -> str:
        """Return the prompt `name`; raise TypeError if `variables` are not exactly those that its template uses."""
        used = self._variables(name)
        if used != set(variables):
            wrong = ", ".join(sorted(used ^ set(variables)))
            raise TypeError(f"prompt {name}: missing or unused variables: {wrong}")
        return self._environment.get_template(name).render(**variables).strip()

    def _variables(self, name: str) -> set[str]:
        """Return the variables of the template and of the parts that it includes."""
        tree = self._environment.parse(_read(name))
        parts = [part for part in meta.find_referenced_templates(tree) if part]
        return meta.find_undeclared_variables(tree).union(*(self._variables(part) for part in parts))


def _read(name: str) -> str:
    return resources.files("prompts").joinpath(f"{name}.j2").read_text(encoding="utf-8")
