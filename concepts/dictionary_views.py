"""Pages of dictionaries and their concepts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from django.contrib import messages
from django.core.paginator import Paginator
from django.db.models import Count, Prefetch
from django.http import Http404, HttpRequest, HttpResponse, StreamingHttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.utils.http import urlencode
from django.views.decorators.http import require_POST

from concepts import compile as compiler
from concepts import featurefile, imports, interchange
from concepts.chosen import feature_url, kept, no_feature
from concepts.concept_forms import ConceptForm, DictionaryForm, MemberForm, member_lines, usable_saes
from concepts.models import Concept, ConceptDictionary, ConceptFeature, Known, Label, known_features, largest_view
from concepts.snippets import Snippet, snippet
from saehub.accounts.access import check, needs
from saehub.fragments import part
from saehub.streaming import attachment
from saehub.typed import whole_number
from saes.listing import Column, listing
from saes.models import SAE

STEERING_ROWS = 24  # of the steering form (inference.forms.MAX_EDITS)
FIRST_MEMBERS = 6
MEMBERS_A_PAGE = 25
TEXTS_A_MEMBER = 2
SHOWN_CHANGES = 40
DICTIONARY_COLUMNS = (
    Column("name", "Dictionary", "name"),
    Column("sae", "SAE", "sae__name"),
    Column("concepts", "Concepts", "n_concepts", figures=True),
    Column("owner", "By", "owner__username"),
    Column("source", "Source", "source"),
    Column("changed", "Changed", "changed_at", figures=True),
)
CONCEPT_COLUMNS = (
    Column("name", "Concept", "name"),
    Column("features", "Features", "n_members", figures=True),
    Column("members", "Of the largest weight"),
    Column("description", "Description"),
)


# -------------------------------------------------------------------------------------------------------- dictionaries


@needs("concepts.view_conceptdictionary")
def dictionary_list(request: HttpRequest) -> HttpResponse:
    rows = ConceptDictionary.objects.select_related("sae", "owner").annotate(n_concepts=Count("concepts"))
    context = {"section": "concepts"} | listing(
        request,
        rows,
        DICTIONARY_COLUMNS,
        search=("name", "source", "sae__name"),
        facets={"sae": ("SAE", "sae__name"), "by": ("By", "owner__username")},
    )
    return render(request, "concepts/dictionary_list.html" + part(request, "rows"), context)


@needs("concepts.add_conceptdictionary")
def dictionary_create(request: HttpRequest) -> HttpResponse:
    form = DictionaryForm(request.POST or None, initial={"sae": request.GET.get("sae")})
    if request.method == "POST" and form.is_valid():
        form.instance.owner = request.user
        return redirect(form.save())
    context = {"section": "concepts", "form": form, "none": not usable_saes().exists()}
    return render(request, "concepts/dictionary_create.html", context, status=422 if form.errors else 200)


@needs("concepts.view_conceptdictionary")
def dictionary_detail(request: HttpRequest, pk: int) -> HttpResponse:
    dictionary = _dictionary(pk)
    first = ConceptFeature.objects.order_by("-weight", "feature")[:FIRST_MEMBERS]
    rows = dictionary.concepts.annotate(n_members=Count("members")).prefetch_related(
        Prefetch("members", queryset=first, to_attr="first")
    )
    found = listing(request, rows, CONCEPT_COLUMNS, search=("name", "description"))
    first_members = [member for concept in found["page"] for member in concept.first]
    labels = Label.objects.accepted_of(dictionary.sae, {member.feature for member in first_members})
    for member in first_members:
        member.label = labels.get(member.feature)
    context = {"section": "concepts", "dictionary": dictionary} | found
    fragment = part(request, "rows")
    if not fragment:
        context["formats"] = imports.losses(dictionary)
        context["revisions"] = dictionary.revisions.defer("changes").select_related("owner")[:5]
    return render(request, "concepts/dictionary_detail.html" + fragment, context)


def _dictionary(pk: int) -> ConceptDictionary:
    return get_object_or_404(ConceptDictionary.objects.select_related("sae__model", "owner"), pk=pk)


@needs("concepts.change_conceptdictionary")
def dictionary_edit(request: HttpRequest, pk: int) -> HttpResponse:
    dictionary = _dictionary(pk)
    check(request.user, "concepts.change_conceptdictionary", dictionary)
    form = DictionaryForm(request.POST or None, instance=dictionary)
    if request.method == "POST" and form.is_valid():
        return redirect(form.save())
    context = {"section": "concepts", "dictionary": _dictionary(pk), "form": form}
    return render(request, "concepts/dictionary_edit.html", context, status=422 if form.errors else 200)


@needs("concepts.delete_conceptdictionary")
def dictionary_delete(request: HttpRequest, pk: int) -> HttpResponse:
    dictionary = _dictionary(pk)
    check(request.user, "concepts.delete_conceptdictionary", dictionary)
    if request.method == "POST":
        dictionary.delete()
        messages.success(request, f"{dictionary.name} is deleted, with its history.")
        return redirect("concepts:dictionary_list")
    context = {"section": "concepts", "dictionary": dictionary, "n_concepts": dictionary.concepts.count()}
    return render(request, "concepts/dictionary_delete.html", context)


@needs("concepts.view_conceptdictionary", post="concepts.change_conceptdictionary")
def dictionary_history(request: HttpRequest, pk: int) -> HttpResponse:
    dictionary = _dictionary(pk)
    if request.method == "POST":
        return _revert(request, dictionary)
    revisions = dictionary.revisions.defer("changes").select_related("owner")
    page: Any = Paginator(revisions, 25).get_page(request.GET.get("page"))
    context = {"section": "concepts", "dictionary": dictionary, "page": page}
    number = request.GET.get("revision", "")
    if number:
        revision = get_object_or_404(dictionary.revisions, number=_number(number))
        changes = sorted(revision.changes.items())
        context |= {"revision": revision, "changes": changes[:SHOWN_CHANGES], "more": len(changes) - SHOWN_CHANGES}
    return render(request, "concepts/dictionary_history.html", context)


def _revert(request: HttpRequest, dictionary: ConceptDictionary) -> HttpResponse:
    check(request.user, "concepts.change_conceptdictionary", dictionary)
    number = _number(request.POST.get("revision", ""))
    if number and not dictionary.revisions.filter(number=number).exists():
        raise Http404(f"{dictionary.name} has no revision {number}.")
    if dictionary.revert(number, request.user) is None:
        messages.info(request, f"It is as it was after revision {number} already.")
    else:
        messages.success(request, f"It is as it was after revision {number} again; that is a revision too.")
    return redirect("concepts:dictionary_history", dictionary.pk)


def _number(text: str) -> int:
    number = whole_number(text)
    if number is None:
        raise Http404(f"There is no revision {text[:20]}.")
    return number


@needs("concepts.view_conceptdictionary")
def dictionary_export(request: HttpRequest, pk: int) -> StreamingHttpResponse:
    return exported(request, _dictionary(pk), f"dictionary-{pk}")


def exported(request: HttpRequest, what: ConceptDictionary | SAE, name: str) -> StreamingHttpResponse:
    """A file of the format in the URL, one of interchange.FORMATS; its name holds nothing that people wrote."""
    form = request.GET.get("format", "jsonl")
    if form not in interchange.FORMATS:
        raise Http404(f"There is no format {form[:40]}; choose one of {', '.join(interchange.FORMATS)}.")
    return file_of(request, form, what, name)


def file_of(request: HttpRequest, form: str, what: ConceptDictionary | SAE, name: str) -> StreamingHttpResponse:
    """A file of one of interchange.FORMATS, written as it is sent."""
    suffix = interchange.SUFFIXES[form]
    kind = "text/csv" if suffix == "csv" else "application/json"
    return attachment(request, imports.export(form, what), name=f"{name}.{suffix}", kind=kind)


# ------------------------------------------------------------------------------------------------------------ concepts


@needs("concepts.change_conceptdictionary")
def concept_create(request: HttpRequest, pk: int) -> HttpResponse:
    dictionary = _dictionary(pk)
    check(request.user, "concepts.change_conceptdictionary", dictionary)
    form = ConceptForm(dictionary, request.POST or None, initial={"members": request.GET.get("feature", "")[:12]})
    if request.method == "POST" and form.is_valid():
        name = form.cleaned_data["name"]
        dictionary.change({name: form.state()}, request.user, f"New concept {name}")
        return redirect(dictionary.concepts.get(name=name))
    context = {"section": "concepts", "dictionary": dictionary, "form": form}
    return render(request, "concepts/concept_create.html", context, status=422 if form.errors else 200)


@needs("concepts.change_conceptdictionary")
def concept_edit(request: HttpRequest, pk: int) -> HttpResponse:
    concept = _concept(pk)
    dictionary = concept.dictionary
    check(request.user, "concepts.change_conceptdictionary", dictionary)
    if request.method == "POST" and "delete" in request.POST:
        dictionary.change({concept.name: None}, request.user, f"Without concept {concept.name}")
        messages.success(request, f"{concept.name} is gone; the history of {dictionary.name} brings it back.")
        return redirect(dictionary)
    initial = {"name": concept.name, "description": concept.description, "members": member_lines(concept)}
    form = ConceptForm(dictionary, request.POST or None, concept=concept, initial=initial)
    if request.method == "POST" and form.is_valid():
        name = form.cleaned_data["name"]
        wanted = {concept.name: None, name: form.state()}  # the same name: only the second stays
        renamed = (concept.name, name) if name != concept.name else None
        dictionary.change(wanted, request.user, f"Concept {name} changed", renamed=renamed)
        return redirect(concept)
    context = {"section": "concepts", "dictionary": dictionary, "concept": concept, "form": form}
    return render(request, "concepts/concept_edit.html", context, status=422 if form.errors else 200)


@require_POST
@needs("concepts.change_conceptdictionary")
def member_add(request: HttpRequest, pk: int, index: int) -> HttpResponse:
    """A feature into a concept, from the feature's page."""
    sae = get_object_or_404(SAE, pk=pk)
    if index >= sae.n_features:
        raise Http404(no_feature(sae, index))
    form = MemberForm(sae, request.POST)
    if form.is_valid():
        dictionary, name = form.cleaned_data["concept"]
        check(request.user, "concepts.change_conceptdictionary", dictionary)
        if dictionary.add_member(name, index, request.user) is None:
            messages.info(request, f"Feature {index} is in {name} already.")
        else:
            messages.success(request, f"Feature {index} is in {name} of {dictionary.name}.")
    else:
        messages.error(request, " ".join(str(error) for error in form.errors["concept"]))
    return redirect(feature_url(sae, index, kept(request)))


def _concept(pk: int) -> Concept:
    return get_object_or_404(Concept.objects.select_related("dictionary__sae__model", "dictionary__owner"), pk=pk)


@dataclass(frozen=True)
class Member:
    """A feature of a concept as its page shows it, with what the largest view knows of it (None without one)."""

    row: ConceptFeature
    label: str | None
    record: featurefile.FeatureRecord | None
    texts: list[Snippet]


@needs("concepts.view_conceptdictionary")
def concept_detail(request: HttpRequest, pk: int) -> HttpResponse:
    concept = _concept(pk)
    sae = concept.dictionary.sae
    members = concept.members.order_by("-weight", "feature")
    page: Any = Paginator(members, MEMBERS_A_PAGE).get_page(request.GET.get("page"))
    page.object_list = _members(sae, list(page.object_list))
    context = {"section": "concepts", "concept": concept, "dictionary": concept.dictionary, "sae": sae, "page": page}
    context |= _strength(request, concept, [member.record for member in page.object_list if member.record])
    return render(request, "concepts/concept_detail.html", context)


def _members(sae: SAE, rows: list[ConceptFeature]) -> list[Member]:
    labels = Label.objects.accepted_of(sae, (row.feature for row in rows))
    found = largest_view(sae)
    made = []
    for row in rows:
        record = None
        try:
            record = found[1].feature(row.feature) if found else None
        except featurefile.ViewError:
            found = None
        texts = (
            [snippet(example, "snippet", record.maximum) for example in record.top[:TEXTS_A_MEMBER]] if record else []
        )
        made.append(Member(row, labels.get(row.feature), record, texts))
    return made


def _strength(request: HttpRequest, concept: Concept, records: list[featurefile.FeatureRecord]) -> dict[str, Any]:
    """The concept at the mode and strength of the URL: what would move, and the edits to steer with."""
    mode = request.GET.get("mode", "add")
    typed = request.GET.get("value", "").strip()
    largest = max((record.maximum for record in records), default=0.0)
    typical = f"{largest:.3g}" if largest else "1"
    usual = {"add": typical, "clamp": typical, "cap": typical, "scale": "2"}
    strength = typed or usual.get(mode, "")
    context = {"mode": mode, "modes": compiler.MODES, "value": strength}
    try:
        value = _float(strength) if mode != "ablate" else 0.0
        return context | moved(concept.dictionary.sae, [concept.edit(mode, value)])
    except compiler.ConfigError as fault:
        return context | {"fault": str(fault)}


def _float(text: str) -> float:
    try:
        return compiler.number_of(float(text), "The strength")
    except ValueError:
        raise compiler.ConfigError(f'The strength "{text[:20]}" is not a number.') from None


@dataclass(frozen=True)
class Moved:
    """A feature that edits move: by how much, and what that comes to."""

    move: compiler.Move
    label: str | None
    known: Known | None
    asked: list[str]

    @property
    def at_maximum(self) -> float | None:
        """z' where z is the feature's maximum."""
        return self.move.at(self.known.maximum) if self.known else None

    @property
    def share(self) -> float | None:
        """Of the layer's mean norm, what add and clamp put on top at most."""
        added = self.move.value if self.move.mode in ("add", "clamp") else self.move.shift
        if self.known is None or self.known.per_norm is None or not added:
            return None
        return abs(added) * self.known.per_norm


def moved(sae: SAE, edits: list[dict[str, Any]]) -> dict[str, Any]:
    """Context of a preview: `moved` features, and `steer`, what the steering form is opened with ("" when too many).

    Raises compiler.ConfigError.
    """
    moves = compiler.moves(edits)
    features, compiled = [move.feature for move in moves], [edit for move in moves for edit in move.edits()]
    labels, known = Label.objects.accepted_of(sae, features), known_features(sae, features)
    words = [str(edit.get("concept") or f"feature {edit.get('feature')}") for edit in edits]
    rows = [
        Moved(move, labels.get(move.feature), known.get(move.feature), [words[i] for i in move.asked]) for move in moves
    ]
    asked = [("sae", sae.pk)] + [
        (name, value)
        for edit in compiled
        for name, value in (("feature", edit["feature"]), ("mode", edit["mode"]), ("value", f"{edit['value']:.6g}"))
    ]
    steer = urlencode(asked) if 0 < len(compiled) <= STEERING_ROWS and sae.model_id else ""
    return {"moved": rows, "steer": steer, "steering_rows": STEERING_ROWS}
