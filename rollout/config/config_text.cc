// The configuration as text: YAML that reads back, JSON for hello, help for a terminal.
#include <fmt/format.h>

#include "rollout/config/config.h"

namespace rollpack::rollout {
namespace {

// How the fields of one section look in YAML; its default beside each where comments are wanted.
template <class Section>
std::string section_yaml(const Section& section, bool with_comments) {
  std::string text;
  Section::fields(section, [&](const char* name, const auto& value, const auto& rule,
                               const char* help, Aliases = {}) {
    if (with_comments) text += fmt::format("  # {}\n  # {}\n", help, rule.allowed());
    text += fmt::format("  {}: {}\n", name, rule.yaml(value));
  });
  return text;
}

template <class Section>
std::string section_json(const Section& section) {
  std::string text;
  Section::fields(section, [&](const char* name, const auto& value, const auto& rule, const char*,
                               Aliases = {}) {
    text += fmt::format("{}\"{}\":{}", text.empty() ? "" : ",", name, rule.json(value));
  });
  return text;
}

}  // namespace

std::string config_yaml(const Config& config, bool with_comments) {
  std::string text;
  Config::sections(config, [&](const char* name, const auto& section, const char* help) {
    if (with_comments) text += fmt::format("{}# {}: {}\n", text.empty() ? "" : "\n", name, help);
    const std::string fields = section_yaml(section, with_comments);
    text += fields.empty() ? fmt::format("{}: {{}}\n", name) : fmt::format("{}:\n{}", name, fields);
  });
  return text;
}

std::string config_json(const Config& config) {
  std::string text;
  Config::sections(config, [&](const char* name, const auto& section, const char*) {
    text += fmt::format("{}\"{}\":{{{}}}", text.empty() ? "" : ",", name, section_json(section));
  });
  return "{" + text + "}";
}

std::string config_help() {
  std::string text;
  const Config defaults;
  Config::sections(defaults, [&](const char* name, const auto& section, const char* help) {
    text += fmt::format("{}: {}\n", name, help);
    section.fields(section, [&](const char* key, const auto& value, const auto& rule,
                                const char* meaning, Aliases aliases = {}) {
      text += fmt::format("  {}.{}: {}\n      {}; default {}\n", name, key, meaning, rule.allowed(),
                          rule.yaml(value));
      if (aliases.size() > 0) text += fmt::format("      also {}\n", fmt::join(aliases, ", "));
    });
  });
  return text;
}

}  // namespace rollpack::rollout
