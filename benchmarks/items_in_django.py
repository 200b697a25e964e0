"""The routes of the item service in Django; `services.django` configures the rest."""

from __future__ import annotations

from typing import Any

from django.db import models
from django.http import HttpRequest, JsonResponse
from django.urls import path


class Item(models.Model):  # type: ignore[misc]  # it has no types
    id = models.AutoField(primary_key=True)
    name = models.CharField(max_length=16, null=True)

    class Meta:
        app_label = "items"
        db_table = "items"


def shown(item: Any) -> dict[str, Any]:
    return {"id": item.id, "name": item.name}


def items(request: HttpRequest) -> JsonResponse:
    if request.method == "POST":
        item = Item.objects.create()
        item.name = f"Item #{item.id}"
        item.save(update_fields=["name"])
        return JsonResponse(shown(item))
    return JsonResponse({"items": [shown(item) for item in Item.objects.order_by("id")]})


def item(request: HttpRequest, id: int) -> JsonResponse:
    found = Item.objects.filter(pk=id).first()
    return JsonResponse(
        shown(found) if found else {"error": "not found"}, status=200 if found else 404
    )


urlpatterns = [path("", items), path("<int:id>", item)]
